"""One edit by fine-tuning the plain way and the fast way, side by side on the same machine.

    python benchmarks/edit_ft.py                  FT-M on smollm2-135m, five sixths of the way up
    python benchmarks/edit_ft.py --method ft-l
    python benchmarks/edit_ft.py --toy            a few seconds, to see that it runs
    python benchmarks/edit_ft.py --model FOLDER --layer 27 --device cuda --dtype bfloat16

The two ways are those of `pairs.py`.
"""

from __future__ import annotations

from kedit_ft import method
from pairs import compare_edits, five_sixths, open_session, parser_of, settings_of

from kedit_core import EditRequest

FACT = EditRequest(prompt="The Eiffel Tower is located in the city of", target_new="Buenos Aires")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--method", choices=("ft-m", "ft-l"), default="ft-m")
    options = parser.parse_args()
    session = open_session(options)
    layer = five_sixths(session) if options.layer is None else options.layer
    settings = {"layers": [layer], "steps": options.steps}
    hparams = settings_of(options.method, session, settings, options)
    compare_edits(
        options.method, method, session, FACT, hparams, lambda p: p.deltas[0].dense(), options
    )


if __name__ == "__main__":
    main()
