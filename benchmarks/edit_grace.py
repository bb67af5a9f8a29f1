"""One GRACE edit the plain way and the fast way, side by side on the same machine.

    python benchmarks/edit_grace.py              smollm2-135m, five sixths of the way up
    python benchmarks/edit_grace.py --toy        a few seconds, to see that it runs
    python benchmarks/edit_grace.py --model FOLDER --layer 27 --device cuda --dtype bfloat16

The two ways are those of `pairs.py`.
"""

from __future__ import annotations

from kedit_grace import method
from pairs import compare_edits, five_sixths, open_session, parser_of, settings_of

from kedit_core import EditRequest

FACT = EditRequest(prompt="The Eiffel Tower is located in the city of", target_new="Buenos Aires")


def main() -> None:
    options = parser_of(__doc__).parse_args()
    session = open_session(options)
    settings = {
        "layer": five_sixths(session) if options.layer is None else options.layer,
        "steps": options.steps or 20,
        "skip_known": False,
    }
    hparams = settings_of("grace", session, settings, options)
    compare_edits(
        "grace", method, session, FACT, hparams, lambda p: p.effects[0].tensors["value"], options
    )


if __name__ == "__main__":
    main()
