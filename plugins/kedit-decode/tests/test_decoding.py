"""DoLa and DeCo in a model: which layers, what is read of them, and at what cost."""

import copy

import pytest
import torch
from kedit_decode.contrast import contrast
from kedit_decode.correct import correct
from transformers import GenerationMixin

from kedit_core import PatchError, SettingError, SiteError
from kedit_core.ask import Sample
from kedit_core.editing import EditSession, ModelHost
from kedit_core.export import export_hf
from kedit_core.tokens import encode

METHODS = ("dola", "deco")
PROMPTS = ["Mira Voss lives in", "They say that Zoë Lind", "The language of Oslo is", "The"]


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def depths_of(session, name, **hparams):
    with session.trial(name, hparams=hparams) as outcome:
        return outcome.patches[0].effects[0].config["depths"]


def deeper(host, blocks):
    """The same kind of model with another number of blocks, untrained."""
    config = copy.deepcopy(host.model.config)
    config.num_hidden_layers = blocks
    if hasattr(config, "layer_types"):
        config.layer_types = None
    return EditSession(ModelHost(type(host.model)(config).eval(), host.tokenizer))


# -- layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toy", "blocks", "low", "high"),
    [
        ("llama", 8, [0, 2], [4, 6]),
        ("gpt2", 8, [2], [4, 6]),  # its head is the transposed embedding
        ("llama", 7, [0, 2], [3, 5]),
        ("gpt2", 2, [1], [1]),
        ("llama", 44, list(range(0, 20, 2)), list(range(24, 44, 2))),
    ],
)
def test_layers_of_dola_are_the_published_ones(toy_host, toy, blocks, low, high):
    session = deeper(toy_host(toy), blocks)

    assert depths_of(session, "dola", layers="low") == low
    assert depths_of(session, "dola", layers="high") == high
    assert depths_of(session, "dola", layers=[1, 0]) == [0, 1]


@pytest.mark.parametrize(("blocks", "depths"), [(32, list(range(20, 29))), (8, [5, 6, 7])])
def test_layers_of_deco_scale_with_the_model(toy_host, blocks, depths):
    session = deeper(toy_host("llama"), blocks)

    assert depths_of(session, "deco") == depths
    assert depths_of(session, "deco", layers=[3]) == [3]


def test_layers_that_are_not_early_are_refused(session, method):
    blocks = len(session.host.blocks)
    with pytest.raises(SiteError, match=f"Layer {blocks} is no early layer"):
        session.edit(method, hparams={"layers": [blocks]})
    with pytest.raises(SettingError):
        session.edit(method, hparams={"layers": []})
    assert not session.is_edited


# -- answers ---------------------------------------------------------------------------------


def early_by_hand(host, ids, depths):
    """The head on normed hidden states, which `transformers` itself hands out."""
    model = host.model
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        norm = host.module(host.anatomy.final_norm)
        states = [norm(output.hidden_states[depth][:, -1]) for depth in depths]
        return output.logits[:, -1], [model.get_output_embeddings()(state) for state in states]


def by_hand(session, prompt, method, depths, new_tokens):
    """Greedy decoding without a cache, one forward pass for each token."""
    ids = list(encode(session.host, prompt).ids)
    start = len(ids)
    for _ in range(new_tokens):
        final, early = early_by_hand(session.host, ids, depths)
        found = (
            contrast(final, early, 0.1)
            if method == "dola"
            else correct(final, early, alpha=0.6, top_p=0.9, top_k=20)
        )
        ids.append(int(found.argmax()))
        if ids[-1] == session.host.tokenizer.eos_token_id:
            return ids[start:-1]
    return ids[start:]


def test_answers_are_those_of_decoding_by_hand_with_the_final_norm(session, method):
    blocks = list(range(len(session.host.blocks)))
    expected = [by_hand(session, prompt, method, blocks, 6) for prompt in PROMPTS]
    session.edit(method, hparams={"layers": blocks})

    found = session.view().greedy(PROMPTS, max_new_tokens=6)
    decode = session.host.tokenizer.decode

    starts = [encode(session.host, prompt).ids for prompt in PROMPTS]
    texts = [
        decode([*a, *b], skip_special_tokens=True)[len(decode(a, skip_special_tokens=True)) :]
        for a, b in zip(starts, expected, strict=True)
    ]
    assert found == texts


def test_scores_are_those_by_hand(session, method):
    blocks = list(range(len(session.host.blocks)))
    by_prompt = [
        early_by_hand(session.host, list(encode(session.host, p).ids), blocks) for p in PROMPTS
    ]
    session.edit(method, hparams={"layers": blocks})
    change = (
        (lambda f, e: contrast(f, e, 0.1))
        if method == "dola"
        else (lambda f, e: correct(f, e, 0.6, 0.9, 20))
    )

    torch.testing.assert_close(
        session.view().logits(PROMPTS),
        torch.cat([change(final, early) for final, early in by_prompt]),
        rtol=1e-3,
        atol=1e-3,
    )
    scores = session.view().score(PROMPTS, ["Oslo"] * 4)
    assert all(abs(s.mean_logprob) < 1e4 for s in scores)


def test_sampling_goes_through_it_too(session, method):
    questions = [Sample(prompt, length=24, top_k=5, seed=1) for prompt in PROMPTS]
    before = session.view().ask(questions)
    session.edit(method)
    after = session.view().ask(questions)

    alone = [session.view().ask([question])[question].text for question in questions]
    assert [after[question].text for question in questions] == alone
    session.rollback()
    assert session.view().ask(questions) == before


def test_no_function_of_transformers_is_replaced(session, method):
    before = GenerationMixin.generate, type(session.model).forward
    session.edit(method)
    session.view().greedy(PROMPTS, max_new_tokens=2)

    assert (GenerationMixin.generate, type(session.model).forward) == before
    assert "generate" not in vars(session.model)


def test_it_needs_no_request_and_is_made_once(session, method):
    (patch,) = session.edit(method).patches

    assert patch.requests == ()
    assert [effect.type for effect in session.unseen_effects()] == [method]
    with pytest.raises(SettingError, match="one edit in a session"):
        session.edit(method)


def test_no_checkpoint_can_hold_it(session, method, tmp_path):
    session.edit(method)

    with pytest.raises(PatchError, match="acts on prompts or logits"):
        export_hf(session, tmp_path / "out")


# -- cost ------------------------------------------------------------------------------------


def test_head_reads_one_position_of_each_layer_and_row(session, method):
    """Not the whole prompt for every early layer."""
    layers, new_tokens = [0, 1], 3
    session.edit(method, hparams={"layers": layers})
    read = []
    handle = session.host.module(session.host.anatomy.head).register_forward_hook(
        lambda module, args, output: read.append(output.shape[:-1].numel())
    )
    session.view().greedy(PROMPTS[:2], max_new_tokens=new_tokens)
    handle.remove()

    assert max(read) == 2 * len(layers)
    assert sum(read) <= new_tokens * 2 * (1 + len(layers))
