"""One WISE edit the plain way and the fast way, side by side on the same machine.

    python benchmarks/edit_wise.py              smollm2-135m at the layer of its preset
    python benchmarks/edit_wise.py --toy        a few seconds, to see that it runs
    python benchmarks/edit_wise.py --model FOLDER --layer 27 --device cuda --dtype bfloat16

The two ways are those of `pairs.py`.
"""

from __future__ import annotations

from kedit_wise import method
from pairs import compare_edits, open_session, parser_of, settings_of

from kedit_core import EditRequest

FACT = EditRequest(prompt="What is the capital of Peru?", target_new="Oslo")


def main() -> None:
    options = parser_of(__doc__).parse_args()
    session = open_session(options)
    settings = {"layer": options.layer, "steps": options.steps}
    hparams = settings_of("wise", session, settings, options)
    compare_edits(
        "wise", method, session, FACT, hparams, lambda p: p.effects[0].tensors["values"], options
    )


if __name__ == "__main__":
    main()
