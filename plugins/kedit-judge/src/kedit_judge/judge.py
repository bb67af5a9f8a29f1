"""What a judge is asked, how its words become a verdict, and what that costs."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from kedit_core.errors import SettingError
from kedit_core.paths import cache_root
from kedit_core.replies import Replies
from kedit_judge.endpoint import Endpoint, Said, number

log = logging.getLogger(__name__)

Item = Mapping[str, str | tuple[str, ...]]  # what is to be judged, by the template's fields
Verdict = float | None  # None where what the judge says is unparseable

_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_LETTER = re.compile(  # no article: "A reply that …" is no verdict
    r"[\W_]*(?:(?i:(?:the |my )?(?:final )?(?:answer|verdict)(?: is)?)[\W_]+)?"
    r"([A-Za-z])(?![^\W_]|['’]|[ \t]+[a-z])"
)


@dataclass(frozen=True)
class Template:
    """What a judge is asked, and what its words mean.

    Another text is another protocol: give the metrics a new version with it.

    Attributes:
        text: the question; `{name}` stands for a field of what is judged.
        read: the verdict in a judge's words.
    """

    text: str
    read: Callable[[str], Verdict]

    @property
    def digest(self) -> str:
        """Short hash of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def prompt(self, item: Item) -> str:
        """What the judge is asked about an item; several texts become a list."""
        filled = {
            field: value if isinstance(value, str) else "\n".join(f"- {text}" for text in value)
            for field, value in item.items()
        }
        return self.text.format(**filled)

    def verdict(self, said: str) -> Verdict:
        """What the judge means; thoughts in `<think>` do not count."""
        return self.read(_THOUGHTS.sub("", said))


def letter_of(said: str, letters: str) -> str:
    """The one of these letters that a judge's words begin with; empty if there is none."""
    found = _LETTER.match(said)
    return found[1].upper() if found and found[1].upper() in letters else ""


@dataclass(frozen=True)
class Prices:
    """Of a million tokens that a judge reads and writes."""

    read: float
    written: float

    @classmethod
    def of(cls, price_in: float | None, price_out: float | None) -> Prices | None:
        """Both, or None where neither is given.

        Raises:
            SettingError: one is missing or is no price.
        """
        if price_in is None and price_out is None:
            return None
        if price_in is None or price_out is None:
            raise SettingError("The judge's price_in and price_out belong together: give both.")
        return cls(number("price_in", price_in), number("price_out", price_out))


@dataclass
class Cost:
    """What a judge was asked so far.

    Attributes:
        calls: replies that came from the endpoint.
        kept: judgements that had been made before and were on disk.
        read, written: tokens of the calls.
        uncounted: calls whose tokens the endpoint did not count.
    """

    calls: int = 0
    kept: int = 0
    read: int = 0
    written: int = 0
    uncounted: int = 0

    def add(self, said: Said) -> None:
        """Count a call."""
        self.calls += 1
        self.read += said.read or 0
        self.written += said.written or 0
        self.uncounted += said.read is None or said.written is None


class Judge:
    """Gives verdicts, each asked for once: replies are kept on disk.

    Args:
        endpoint: where the judge is.
        template: what it is asked.
        workers: how many calls run at the same time.
        prices: where cost is to be told in money.

    Raises:
        SettingError: the number of workers is none.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        template: Template,
        workers: int = 8,
        prices: Prices | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.template = template
        self.workers = int(number("workers", workers, least=1, whole=True))
        self.prices = prices
        self.cost = Cost()
        self._kept = Replies(cache_root() / "judge" / "replies.sqlite")
        self._known: dict[str, Verdict] = {}
        self._logged = Cost()

    def verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        """A verdict for each item.

        Raises:
            SettingError: the endpoint refuses to work; what it said before is kept.
            ArtifactError: kept replies cannot be read or written.
        """
        keys = [self._key(item) for item in items]
        new = {k: item for k, item in zip(keys, items, strict=True) if k not in self._known}
        found = self._kept.get(new)
        self.cost.kept += len(found)
        missing = [key for key in new if key not in found]
        if missing:
            self.endpoint.connect()  # once, before threads share it
            with ThreadPoolExecutor(self.workers) as pool:
                said = pool.map(lambda key: self._ask(key, new[key]), missing)
                for key, reply in zip(missing, said, strict=True):
                    self.cost.add(reply)
                    found[key] = reply.text
        self._known.update({key: self.template.verdict(text) for key, text in found.items()})
        return [self._known[key] for key in keys]

    def log_cost(self, what: str) -> None:
        """Log what was asked so far, unless that was logged already."""
        cost = replace(self.cost)
        if cost == self._logged:
            return
        self._logged = cost
        line = (
            f"Judge {self.endpoint.model} (prompt {self.template.digest}, {what}) so far: "
            f"{cost.calls} calls, {cost.kept} kept answers, "
            f"{cost.read} tokens read, {cost.written} written"
        )
        if self.prices:
            money = (cost.read * self.prices.read + cost.written * self.prices.written) / 1e6
            line += f", cost {money:.4f}"
        if cost.uncounted:
            line += f"; the endpoint did not count the tokens of {cost.uncounted} calls"
        log.info("%s.", line)

    def _ask(self, key: str, item: Item) -> Said:
        said = self.endpoint.ask(self.template.prompt(item))
        self._kept.put({key: said.text})  # at once: it is paid for
        return said

    def _key(self, item: Item) -> str:
        endpoint = self.endpoint
        prompt = self.template.digest
        content = [endpoint.model, endpoint.temperature, prompt, *item.values()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
