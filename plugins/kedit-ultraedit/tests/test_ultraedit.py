"""UltraEdit on toy models, against plain passes, direct statistics and solves in input space."""

from __future__ import annotations

import logging

import pytest
import torch
from kedit_ultraedit.flow import flows
from kedit_ultraedit.hparams import UltraEditHyperParams
from kedit_ultraedit.method import chosen_sites, ridge_regression
from kedit_ultraedit.normaliser import Normaliser
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kedit_core import EditError, EditRequest, SettingError, SiteError, discover
from kedit_core.editing import EditSession, ModelHost, Patch
from kedit_core.hparams import presets_of, resolve
from kedit_core.models import config_facts
from kedit_core.testing.toys import load_toy, toy_facts
from kedit_core.tokens import Row, join

SETTINGS = {"matrices": {"mlp_in": [1, 2, 3], "mlp_out": [2], "attention_out": [3]}, "lr": 3e-3}
MLP = {"matrices": {"mlp_in": [1, 2, 3]}, "lr": 1e-2}


def requests(count: int) -> list[EditRequest]:
    """Facts about different subjects, of different lengths; without subjects."""
    chosen = toy_facts()[1 : 1 + 3 * count : 3]
    return [
        EditRequest(prompt=f.prompt.replace("{}", f.subject), target_new=f.target_new)
        for f in chosen
    ]


def rows_of(host: ModelHost, wanted: list[EditRequest]) -> list[Row]:
    return [join(host, r.text, r.target_new) for r in wanted]


def edit(session: EditSession, wanted: list[EditRequest], settings=SETTINGS) -> Patch:
    (patch,) = session.edit("ultraedit", wanted, hparams=settings).patches
    return patch


def likelihoods(session: EditSession, wanted: list[EditRequest]) -> Tensor:
    scores = session.view().score([r.text for r in wanted], [r.target_new for r in wanted])
    return torch.tensor([score.mean_logprob for score in scores])


def assert_close(patch: Patch, expected: Patch) -> None:
    """Padding makes sums run in another order, which float32 shows."""
    for delta, other in zip(patch.deltas, expected.deltas, strict=True):
        assert delta.site == other.site
        difference = (delta.dense() - other.dense()).norm()
        assert difference < 1e-3 * other.dense().norm()


# -- numerics ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "d_in", "d_out"), [(1, 7, 3), (5, 40, 30), (39, 40, 60), (90, 40, 9)]
)
@pytest.mark.parametrize("ridge", [1.0, 1e-3])
def test_solves_in_row_space_and_in_input_space_agree(rows, d_in, d_out, ridge):
    g = torch.Generator().manual_seed(0)
    h = 30 * torch.randn(rows, d_in, generator=g, dtype=torch.float64)
    v = torch.randn(rows, d_out, generator=g, dtype=torch.float64)

    left, right, _ = ridge_regression(h, v, ridge)

    moment = h.mT @ h + ridge * torch.eye(d_in)
    expected = torch.linalg.solve(moment, h.mT @ v).mT
    change = left if right is None else left @ right
    torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rows", "d_in"), [(5, 40), (90, 40)])
def test_condition_of_a_system_is_never_below_its_estimate(rows, d_in):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(rows, d_in, generator=g, dtype=torch.float64) * torch.logspace(-3, 1, d_in)

    _, _, estimate = ridge_regression(h, torch.ones(rows, 3), 1e-3)

    system = h @ h.mT if rows < d_in else h.mT @ h
    exact = float(torch.linalg.cond(system + 1e-3 * torch.eye(len(system))))
    assert 1 < estimate <= exact
    assert ridge_regression(torch.zeros(3, 4), torch.ones(3, 2), 9.0)[2] == 1


@pytest.mark.parametrize(("rows", "d_in"), [(30, 70), (70, 30)])
@pytest.mark.parametrize(("size", "condition"), [(1e12, r"\de[+]\d+"), (torch.inf, "inf")])
def test_system_that_is_not_positive_definite_is_refused_with_its_condition(
    rows, d_in, size, condition
):
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, 2, generator=g), torch.randn(2, d_in, generator=g)
    h = size * (left.double() @ right.double())
    message = rf"is not positive definite \(condition {condition}\).*Raise `ridge`"
    with pytest.raises(EditError, match=message) as caught:
        ridge_regression(h, torch.ones(rows, 2), 1e-9)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [(100,), (1, 99), (1, 1, 40, 58), (50, 50), (99, 1)])
def test_merged_statistics_are_those_of_all_rows(sizes):
    """Faults: unbiased variances in the merge, NaN of a part with one row, lost digits."""
    g = torch.Generator().manual_seed(0)
    rows = 1e4 + torch.randn(100, 6, generator=g, dtype=torch.float64)

    merged, *others = map(Normaliser.of, rows.split(sizes))
    for other in others:
        merged = merged.merged(other)

    torch.testing.assert_close(merged.mean, rows.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.squares / 99, rows.var(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        merged.applied(rows), (rows - rows.mean(0)) / rows.std(0), rtol=1e-5, atol=1e-5
    )


def test_single_row_is_its_own_mean():
    row = torch.tensor([[3.0, -2.0]])
    assert torch.equal(Normaliser.of(row).applied(row), torch.zeros(1, 2, dtype=torch.float64))


# -- hidden states and gradients -----------------------------------------------------------------


def plain_loss(model, row: Row) -> Tensor:
    """Cross-entropy of the target's tokens, summed, from one row without padding."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0]
    return cross_entropy(logits[len(row.prompt) - 1 :], torch.tensor(row.targets), reduction="sum")


def test_gradients_of_all_positions_make_up_those_of_the_weights(host):
    """Σ g hᵀ over all tokens is what a full pass with gradients of the weights gives."""
    sites = chosen_sites(host, UltraEditHyperParams(**SETTINGS).matrices)
    rows = rows_of(host, requests(4))
    host.model.requires_grad_(False)
    found, loss = flows(host, sites, rows, "all", batch_tokens=100)

    weights = [host.parameter(site).requires_grad_(True) for site in sites]
    total = sum(plain_loss(host.model, row) for row in rows)
    expected = torch.autograd.grad(total, weights)
    assert loss == pytest.approx(
        float(total.detach()) / sum(len(r.targets) for r in rows), rel=1e-5
    )
    for site, gradient in zip(sites, expected, strict=True):
        made_up = found[site].gradients.mT @ found[site].inputs
        scale = float(gradient.abs().max())
        torch.testing.assert_close(made_up, site.view(gradient), rtol=1e-3, atol=1e-5 * scale)


def test_gradient_is_the_slope_of_the_loss_at_the_target_positions(toy_host):
    """Finite differences: the module's output is moved at one position."""
    host = toy_host("gpt2", torch.float64)
    host.model.requires_grad_(False)
    site = host.mlp_out(1)
    (row,) = rows = rows_of(host, requests(1))
    found, _ = flows(host, [site], rows, "target", batch_tokens=100)
    assert found[site].gradients.shape == (len(row.targets), 48)

    for token, gradient in enumerate(found[site].gradients):
        losses = []
        for sign in (1, -1):

            def move(module, args, output, token=token, sign=sign):
                output[0, len(row.prompt) - 1 + token, 7] += sign * 1e-4

            handle = host.module(site.module).register_forward_hook(move)
            losses.append(float(plain_loss(host.model, row)))
            handle.remove()
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(float(gradient[7]), rel=1e-4)


def test_graph_begins_at_the_lowest_edited_module(toy_host):
    host = toy_host("llama")
    host.model.requires_grad_(False)
    in_graph = []
    for block in host.blocks:
        host.module(block.path).register_forward_hook(
            lambda module, args, output: in_graph.append(output.requires_grad)
        )
    flows(host, [host.mlp_out(3), host.mlp_out(2)], rows_of(host, requests(2)), "target", 100)
    assert in_graph == [False, False, True, True]


# -- the whole edit ------------------------------------------------------------------------------


def plain_edit(host: ModelHost, batches, settings) -> list[dict[str, Tensor]]:
    """Each request its own full pass, statistics of all rows so far, solves in input space."""
    model = host.model.requires_grad_(True)
    sites = chosen_sites(host, UltraEditHyperParams(**settings).matrices)
    seen: dict[tuple[int, ...], list[Tensor]] = {}
    changes = []
    for batch in batches:
        rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {s.parameter: ([], []) for s in sites}
        for row in rows_of(host, batch):
            kept = {}

            def keep(module, args, output, kept=kept):
                output.retain_grad()
                kept[module] = args[0], output

            modules = [host.module(site.module) for site in sites]
            handles = [module.register_forward_hook(keep) for module in modules]
            plain_loss(model, row).backward()
            for handle in handles:
                handle.remove()
            for site, module in zip(sites, modules, strict=True):
                given, output = kept[module]
                for into, tensor in zip(rows[site.parameter], (given, output.grad), strict=True):
                    into.append(tensor.detach()[0, len(row.prompt) - 1 :].double())
            model.zero_grad()
        made = {site: [torch.cat(part) for part in rows[site.parameter]] for site in sites}
        for h, g in made.values():
            seen.setdefault((h.shape[1], g.shape[1]), []).append(torch.cat([h, g], 1))
        changes.append({})
        for site, (h, g) in made.items():
            every = torch.cat(seen[h.shape[1], g.shape[1]])
            normal = (torch.cat([h, g], 1) - every.mean(0)) / every.std(0)
            h_hat, g_hat = normal[:, : h.shape[1]], normal[:, h.shape[1] :]
            v = -settings["lr"] * h_hat.square().sum(1, keepdim=True) * g_hat
            change = torch.linalg.solve(h.mT @ h + torch.eye(h.shape[1]), h.mT @ v).mT
            changes[-1][site.parameter] = change
            with torch.no_grad():
                host.weight(site).add_(change.float())
    return changes


@pytest.mark.parametrize("toy", ["gpt2", "llama"])
def test_sequence_of_batches_is_what_the_plain_way_computes(toy, toy_host):
    wanted = requests(7)
    batches = [wanted[:4], wanted[4:]]
    session = EditSession(toy_host(toy))

    patches = [edit(session, batch) for batch in batches]

    for patch, expected in zip(patches, plain_edit(toy_host(toy), batches, SETTINGS), strict=True):
        assert {d.site.parameter for d in patch.deltas} == expected.keys()
        for delta in patch.deltas:
            change = expected[delta.site.parameter]
            assert (delta.dense() - change).norm() < 1e-3 * change.norm()


def test_neither_order_nor_passes_change_an_edit(host):
    wanted, session = requests(7), EditSession(host)
    with session.trial("ultraedit", wanted, hparams=SETTINGS) as outcome:
        (whole,) = outcome.patches
    for again, tokens in ((wanted, 1), (wanted[::-1], 1024), (wanted[3:] + wanted[:3], 40)):
        with session.trial("ultraedit", again, hparams=SETTINGS | {"batch_tokens": tokens}) as o:
            assert_close(o.patches[0], whole)


@pytest.mark.parametrize("tokens", [1, 30, 1024])
def test_every_request_is_in_the_change(tokens, session):
    """Fault: requests beyond a multiple of the mini-batch are dropped."""
    wanted = requests(7)
    targets = sum(len(row.targets) for row in rows_of(session.host, wanted))
    before = likelihoods(session, wanted)

    patch = edit(session, wanted, MLP | {"batch_tokens": tokens})

    assert patch.notes["tokens"] == targets
    assert bool((likelihoods(session, wanted) > before + 0.5).all())


def test_requests_that_share_a_prompt_are_told(session, caplog):
    wanted = requests(3)
    torn = wanted[1].model_copy(update={"target_new": "Rome"})

    with caplog.at_level(logging.WARNING):
        edit(session, wanted)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        edit(session, [*wanted, wanted[0], torn])

    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"Requests that stand several times in one batch: 1, first {wanted[0].text!r}.",
        f"Prompts with several targets in one batch: 1, first {wanted[1].text!r}.",
    ]


def test_notes_have_the_estimated_condition_of_each_system(session):
    patch = edit(session, requests(3), MLP)

    assert len(patch.notes["condition_estimates"]) == len(patch.deltas)
    assert min(patch.notes["condition_estimates"]) >= 1


def test_statistics_run_through_the_sequence_and_roll_back_with_it(session):
    first, second = requests(6)[:3], requests(6)[3:]
    one = edit(session, first)
    mark = session.savepoint()
    two = edit(session, second)
    counts = {name: float(t) for name, t in two.state.items() if name.endswith(".count")}
    for name, count in counts.items():
        assert count > float(one.state[name])

    session.rollback(mark)
    again = edit(session, second)

    assert all(torch.equal(again.state[name], two.state[name]) for name in two.state)
    for delta, other in zip(again.deltas, two.deltas, strict=True):
        assert torch.equal(delta.dense(), other.dense())
    session.rollback()
    alone = edit(session, second)
    assert all(float(alone.state[n]) < count for n, count in counts.items())


def test_statistics_of_matrices_that_an_edit_leaves_alone_are_kept(session):
    first = edit(session, requests(3), {"matrices": {"mlp_out": [2]}, "lr": 1e-3})
    second = edit(session, requests(3), {"matrices": {"attention_out": [2]}, "lr": 1e-3})
    assert first.state.keys() < second.state.keys()


def test_two_matrices_of_one_shape_share_their_statistics(toy_host):
    session = EditSession(toy_host("llama"))
    patch = edit(session, requests(3), {"matrices": {"gate": [1, 2], "up": [3]}, "lr": 1e-3})
    assert sorted(patch.state) == ["112x48.count", "112x48.mean", "112x48.squares"]
    assert float(patch.state["112x48.count"]) == 3 * patch.notes["tokens"]


def of_one_token(host: ModelHost) -> EditRequest:
    return next(
        r
        for r, row in zip(requests(30), rows_of(host, requests(30)), strict=True)
        if len(row.targets) == 1
    )


def test_target_of_one_token_is_written(session):
    """Fault: NaN where a mini-batch has one token."""
    request = of_one_token(session.host)
    before = likelihoods(session, [request])

    patch = edit(session, [request], MLP)

    assert patch.notes["tokens"] == 1
    assert likelihoods(session, [request]) > before + 1


def test_first_edit_of_a_single_row_is_refused(session):
    request = of_one_token(session.host)
    with pytest.raises(EditError, match="one row to normalise by"):
        edit(session, [request], {"matrices": {"mlp_out": [2]}, "lr": 1e-3})
    assert not session.is_edited

    edit(session, requests(3), {"matrices": {"mlp_out": [2]}, "lr": 1e-3})
    edit(session, [request], {"matrices": {"mlp_out": [2]}, "lr": 1e-3})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_changes_of_16_bit_weights_are_kept_in_float32(dtype, toy_host):
    wanted = requests(5)
    exact = edit(EditSession(toy_host("llama")), wanted, MLP)
    session = EditSession(toy_host("llama", dtype))
    before = likelihoods(session, wanted)

    patch = edit(session, wanted, MLP)

    assert bool((likelihoods(session, wanted) > before + 0.5).all())
    for delta, other in zip(patch.deltas, exact.deltas, strict=True):
        assert delta.left.dtype == torch.float32
        similarity = torch.cosine_similarity(delta.dense().flatten(), other.dense().flatten(), 0)
        assert similarity > 0.9  # signs of gradients near zero may differ


@pytest.mark.parametrize(
    ("matrices", "message"),
    [({"mlp_out": [9]}, "Layer 9"), ({"gate": [1]}, "`gate`"), ({"experts_out": [1]}, "`experts")],
)
def test_matrices_that_do_not_exist_are_refused(matrices, message, toy_host):
    session = EditSession(toy_host("gpt2"))
    with pytest.raises(SiteError, match=message):
        edit(session, requests(1), {"matrices": matrices, "lr": 1e-3})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"matrices": {}},
        {"matrices": {"mlp_out": []}},
        {"matrices": {"mlp": [1]}},
        {"matrices": {"mlp_out": [-1]}},
        {"matrices": {"up": [1]}, "ridge": 0},
    ],
)
def test_settings_out_of_bounds_are_refused(settings):
    with pytest.raises(SettingError):
        resolve(discover().method("ultraedit"), settings=settings)


# -- other architectures -------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["target", "all"])
def test_encoder_decoder_is_edited_in_its_decoder(positions):
    _, tokenizer = load_toy("llama")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(
        vocab_size=len(tokenizer),
        decoder_start_token_id=0,
        pad_token_id=0,
        feed_forward_proj="gated-gelu",
        **sizes,
    )
    torch.manual_seed(0)
    session = EditSession(ModelHost(T5ForConditionalGeneration(config), tokenizer, "tiny-t5"))
    wanted = [
        EditRequest(prompt="Mira Voss lives in", target_new="New Haven and Port Sable"),
        EditRequest(prompt="Tamsin speaks", target_new="Rome"),
    ]
    before = likelihoods(session, wanted)
    matrices = {"gate": [0, 1], "up": [0, 1], "mlp_out": [1], "attention_out": [1]}

    patch = edit(session, wanted, {"matrices": matrices, "lr": 1e-2, "positions": positions})

    assert len(patch.deltas) == 6
    assert all(".decoder." in f".{delta.site.parameter}" for delta in patch.deltas)
    assert bool((likelihoods(session, wanted) > before + 0.5).all())


@pytest.fixture(params=["eager", "batched_mm"])
def mixtral(request) -> ModelHost:
    _, tokenizer = load_toy("llama")
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        experts_implementation=request.param,
    )
    torch.manual_seed(0)
    return ModelHost(MixtralForCausalLM(config), tokenizer, "tiny-mixtral")


def test_experts_make_up_the_gradient_of_their_stack(mixtral):
    sites = chosen_sites(mixtral, {"experts_out": [0, 1]})
    rows = rows_of(mixtral, requests(4))
    mixtral.model.requires_grad_(False)
    found, _ = flows(mixtral, sites, rows, "all", batch_tokens=100)

    stacks = [mixtral.stored(site).requires_grad_(True) for site in sites]
    total = sum(plain_loss(mixtral.model, row) for row in rows)
    expected = torch.autograd.grad(total, stacks)
    assert {site.expert for site in found} == {0, 1, 2, 3}
    for site, flow in found.items():
        stack = expected[[s.parameter for s in sites].index(site.parameter)]
        made_up = flow.gradients.mT @ flow.inputs
        scale = float(stack.abs().max())
        torch.testing.assert_close(made_up, site.view(stack), rtol=1e-3, atol=1e-5 * scale)


def test_experts_and_attention_of_a_mixture_are_edited(mixtral):
    session, wanted = EditSession(mixtral), requests(4)
    before = likelihoods(session, wanted)
    original = mixtral.stored(chosen_sites(mixtral, {"experts_out": [1]})[0]).detach().clone()

    patch = edit(
        session, wanted, {"matrices": {"experts_out": [1], "attention_out": [1]}, "lr": 1e-2}
    )

    experts = {d.site.expert for d in patch.deltas}
    assert experts > {None}
    assert bool((likelihoods(session, wanted) > before + 0.2).all())
    session.rollback()
    assert torch.equal(mixtral.stored(patch.deltas[-1].site), original)


def test_mixture_has_no_single_output_matrix(mixtral):
    with pytest.raises(SiteError, match="routed experts"):
        edit(EditSession(mixtral), requests(1), {"matrices": {"mlp_out": [1]}, "lr": 1e-3})


def test_experts_that_work_in_another_way_are_refused(mixtral):
    site = chosen_sites(mixtral, {"experts_out": [1]})[0]
    module = mixtral.module(site.module)
    forward = module.forward
    module.forward = lambda *args: forward(*args).tanh() * 3
    with pytest.raises(SiteError, match="do not work as those"):
        edit(EditSession(mixtral), requests(2), {"matrices": {"experts_out": [1]}, "lr": 1e-3})


# -- presets -------------------------------------------------------------------------------------

# The shapes of published models, as their configs give them.
CONFIGS = {
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28}),
    "mistral-7b": ("mistral", {"hidden_size": 4096, "num_hidden_layers": 32}),
    "llama-3-8b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    ),
    "qwen2.5-7b": ("qwen2", {"hidden_size": 3584, "num_hidden_layers": 28}),
    "phi-4": ("phi3", {"hidden_size": 5120, "num_hidden_layers": 40, "pad_token_id": 0}),
    "gemma-3-27b": ("gemma3", {"text_config": {"hidden_size": 5376, "num_hidden_layers": 62}}),
}


def between(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


PUBLISHED = {
    "gpt-j-6b": {"mlp_out": between(18, 26)},
    "mistral-7b": {"mlp_out": (29, 30)},
    "llama-3-8b": {"gate": between(11, 15), "up": between(18, 24)},
    "qwen2.5-7b": {"gate": between(18, 26), "up": between(18, 26)},
    "phi-4": {"mlp_out": between(30, 38)},
    "gemma-3-27b": {"gate": between(52, 60), "up": between(52, 60)},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_preset_is_chosen_by_config_and_gives_the_published_settings(name):
    kind, shape = CONFIGS[name]
    config = config_facts(AutoConfig.for_model(kind, **shape).to_dict())

    settings = resolve(discover().method("ultraedit"), config=config)

    hparams = settings.hparams
    assert settings.origin["matrices"] == f"preset {name}"
    assert hparams.matrices == PUBLISHED[name]
    assert (hparams.lr, hparams.ridge, hparams.positions) == (1e-6, 1.0, "target")


def test_every_preset_is_valid_and_names_its_source():
    spec = discover().method("ultraedit")
    presets = presets_of(spec)
    assert {preset.name for preset in presets} == {*CONFIGS, "smollm2-135m", "toy"}
    for preset in presets:
        assert preset.source
        resolve(spec, preset=preset.name)
