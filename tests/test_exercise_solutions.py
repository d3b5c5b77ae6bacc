"""Every exercise: the reference scores full points, the stub none, and a wrong solution loses what it broke."""

import importlib

import numpy as np
import pytest

from minidsv3.exercises import Finding
from minidsv3.exercises.checker import catalogue, evaluate
from minidsv3.exercises.handed_in import read_solutions
from minidsv3.exercises.planted import function_of, planted
from minidsv3.exercises.sources import for_students, notebook, read_percent, sources

SOURCES = sources()
NAMES = list(catalogue())
SEEDS = (0, 1, 77)


def solution_of(name, tmp_path, *changes):
    """The reference solution, with text replaced, read from its source as a student's file would be."""
    text = SOURCES[name].read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, (name, old, text.count(old))
        text = text.replace(old, new)
    path = tmp_path / SOURCES[name].name
    path.write_text(text, encoding="utf-8")
    (found,), troubles = read_solutions(path)
    assert not troubles
    assert found.name == name
    return found


def lost(name, submission, variant=None, seed=5):
    return {r.property.name for r in evaluate(name, submission, seed=seed, variant=variant) if r.detail}


@pytest.mark.parametrize("name", NAMES)
def test_reference_scores_full_points_on_several_seeds(name, tmp_path):
    found = solution_of(name, tmp_path)
    for seed in SEEDS:
        assert lost(name, found.submission, found.variant, seed) == set()


@pytest.mark.parametrize("name", NAMES)
def test_untouched_student_notebook_scores_zero(name, tmp_path):
    path = tmp_path / f"{SOURCES[name].stem}.ipynb"
    cells = read_percent(SOURCES[name].read_text(encoding="utf-8"))
    path.write_text(notebook(for_students(cells)), encoding="utf-8")
    (found,), _ = read_solutions(path)
    results = evaluate(name, found.submission, variant=found.variant)
    assert sum(r.points for r in results) == 0
    assert all("NotImplementedError" in r.detail for r in results)


@pytest.mark.parametrize("name", NAMES)
def test_exercise_has_three_to_six_properties_and_ten_points(name):
    exercise = catalogue()[name]
    assert 3 <= len(exercise.properties) <= 6
    assert exercise.points == 10
    assert all(p.hint and p.says for p in exercise.properties)


def test_there_are_enough_exercises_of_every_kind():
    kinds = [e.kind for e in catalogue().values()]
    assert len(kinds) >= 20
    assert kinds.count("B") >= 8
    assert set(kinds) == set("IABM")


@pytest.mark.parametrize("name", [n for n in NAMES if catalogue()[n].kind == "A"])
def test_wrong_number_loses_exactly_its_question(name, tmp_path):
    found = solution_of(name, tmp_path)
    for question, answer in found.submission.items():
        for wrong in (answer() * 1.03, answer() * 1000, str(answer()), None, True, np.nan):
            assert lost(name, found.submission | {question: wrong}, found.variant) == {question}


@pytest.mark.parametrize("name", [n for n in NAMES if catalogue()[n].kind == "B"])
def test_half_a_finding_loses_exactly_the_other_half(name, tmp_path):
    found = solution_of(name, tmp_path)
    line, witness, repaired = found.submission
    module = importlib.import_module(f"minidsv3.exercises.{SOURCES[name].stem}")
    given = function_of(planted(module.CORRECT, module.BUGS[0]))
    assert lost(name, Finding(line() + 1, witness, repaired), found.variant) == {"line", "witness"}
    assert lost(name, Finding(str(line()), witness, repaired), found.variant) == {"line", "witness"}
    assert lost(name, Finding(line, dict, repaired), found.variant) == {"witness"}
    nan = {n: v * np.nan if getattr(v, "dtype", np.dtype(int)).kind == "f" else v for n, v in witness().items()}
    assert lost(name, Finding(line, lambda: nan, repaired), found.variant) == {"witness"}
    assert lost(name, Finding(line, witness, given), found.variant) == {"repaired"}


# exercise -> ((text of the reference, what a student might write instead), properties lost). The stored case is lost
# with every value that changes; it asks for no type, memory, bytes or generator, and has no tile of zeros.
WRONG = {
    "rms_norm": [
        (
            (
                "r = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(eps))",
                "r = 1 / (np.sqrt((x * x).mean(axis=-1, keepdims=True)) + x.dtype.type(eps))",
            ),
            {"values", "gradients", "golden"},
        ),
        (("+ x.dtype.type(eps)", "+ np.float64(eps)"), {"types"}),
        (("g - x * r * r * (g * x).mean(axis=-1, keepdims=True)", "g"), {"gradients", "golden"}),
        (
            ("(dy * x * r).reshape(-1, x.shape[-1]).sum(axis=0)", "(dy * x * r).reshape(-1, x.shape[-1]).mean(axis=0)"),
            {"gradients", "golden"},
        ),
    ],
    "cross_entropy": [
        (("dlogits[np.arange(len(log_p)), safe] -= 1", "pass"), {"gradients", "golden"}),
        (("count = max(int(valid.sum()), 1)", "count = len(valid)"), {"values", "golden"}),
        (
            (
                "np.asarray(-(log_p[rows, safe] * valid).sum() / count, dtype=logits.dtype)",
                "np.asarray(-(log_p[rows, safe] * valid).sum() / count, dtype=np.float64)",
            ),
            {"types"},
        ),
    ],
    "rope": [
        (
            (
                "(slice(0, None, 2), slice(1, None, 2)) if interleave else (slice(0, half), slice(half, None))",
                "(slice(0, None, 2), slice(1, None, 2))",
            ),
            {"halves", "golden"},
        ),
        (("np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])", "np.arange(d)"), {"permutation", "golden"}),
        (("y = np.empty_like(x)", "y = np.empty(x.shape)"), {"types"}),
    ],
    "yarn_ramp": [
        (("np.floor(pair(beta_fast))", "np.round(pair(beta_fast)) + 1"), {"ramp", "golden"}),
        (
            ("plain * (1 - ramp) + plain / factor * ramp", "plain * (1 - ramp) + plain / factor"),
            {"ends", "order", "no_stretch", "ramp", "golden"},
        ),
        (
            ("ramp = np.clip((j - low) / max(high - low, 0.001), 0, 1)", "ramp = np.clip(j / high, 0, 1)"),
            {"ramp", "golden"},
        ),
    ],
    "absorbed_decoding": [
        (("+ q[:, d_n:] @ k_rope.T", "+ 0 * (q[:, d_n:] @ k_rope.T)"), {"position", "naive", "golden"}),
        (("scores = scale * (query @ latent.T", "scores = (query @ latent.T"), {"position", "naive", "golden"}),
        (
            (
                'np.einsum("hr,hvr->hv", p @ latent, w_uv)',
                'np.einsum("hl,lhv->hv", p, np.einsum("lr,hvr->lhv", latent, w_uv))',
            ),
            {"memory"},
        ),
    ],
    "router": [
        (("choice = (scores + bias)", "choice = (scores - bias)"), {"bias", "groups", "negative", "golden"}),
        (
            ("np.where(allowed[:, :, None], choice, -np.inf)", "np.where(allowed[:, :, None], choice, 0)"),
            {"negative", "golden"},
        ),
        (("[:, :, -2:].sum", "[:, :, -1:].sum"), {"groups", "negative", "golden"}),
        (
            (
                'np.argsort(-masked, axis=1, kind="stable")[:, :top_k]',
                'np.argsort(masked, axis=1, kind="stable")[:, ::-1][:, :top_k]',
            ),
            {"ties", "golden"},
        ),
    ],
    "dispatch": [
        (("minlength=E", "minlength=0"), {"counts", "golden"}),
        (("row_of_slot[slot_of_row] = np.arange(T * K)", "row_of_slot[:] = slot_of_row"), {"inverse", "golden"}),
        (
            ('"tk,tkd->td", weights, rows[row_of_slot]', '"tk,tkd->td", np.ones_like(weights), rows[row_of_slot]'),
            {"combine", "golden"},
        ),
    ],
    "bias_update": [
        (("np.sign(load.mean() - load)", "np.sign(load - load.mean())"), {"direction", "adds_up", "golden"}),
        (("np.sign(load.mean() - load)", "(load.mean() - load)"), {"size", "adds_up", "golden"}),
        (("bias + np.float32(speed)", "0 * bias + np.float32(speed)"), {"balanced", "adds_up", "golden"}),
    ],
    "sequence_loss": [
        (("(dshare - (dshare * share).sum(axis=1, keepdims=True)) / total", "dshare / total"), {"gradients", "golden"}),
        (("scores.dtype.type(E / (K * S))", "scores.dtype.type(E / S)"), {"values", "golden"}),
        (
            (
                "return np.asarray((f * P).sum() / batch, dtype=scores.dtype)",
                "return np.asarray((f * P).sum() / batch, dtype=float)",
            ),
            {"types"},
        ),
    ],
    "mtp_targets": [
        (
            ("tokens[:, depth + 1 : depth + 1 + places]", "tokens[:, depth : depth + places]"),
            {"main", "targets", "no_copy", "golden"},
        ),
        (("tokens[:, depth : depth + places]", "tokens[:, :places]"), {"seen", "golden"}),
        (
            ("places = tokens.shape[1] - 1 - depth", "places = tokens.shape[1] - 2 - depth"),
            {"main", "lengths", "targets", "seen", "golden"},
        ),
    ],
    "accept_reject": [
        (("rng.random() < p[draft] / q[draft]", "p[draft] > 0.25"), {"equal", "rate", "lossless", "golden"}),
        (("rest = np.maximum(p - q, 0)", "rest = p"), {"after_rejection", "lossless", "golden"}),
        (
            ("rng.random() < p[draft] / q[draft]", "rng.random() < (p[draft] / q[draft]) ** 2"),
            {"rate", "lossless", "golden"},
        ),
    ],
    "resume": [
        (
            ('for name in ("weights", "exp_avg", "exp_avg_sq")', 'for name in ("weights", "exp_avg")'),
            {"moments", "bits", "golden"},
        ),
        (("run.rng.bit_generator.state = state", "pass"), {"generator", "bits"}),
        (("getattr(run, name).copy()", "getattr(run, name)"), {"bits"}),
        (
            ("arrays, run.steps, run.position, state = saved", "arrays, run.steps, _, state = saved"),
            {"counters", "bits", "golden"},
        ),
    ],
    "quantize_tile": [
        (("round_e4m3(x / np.repeat", "(x / np.repeat"), {"codes", "golden"}),
        (("np.where(amax > 0, amax / np.float32(448), np.float32(1))", "amax / np.float32(448)"), {"zeros"}),
        (
            ("starts = np.arange(0, x.shape[1], block)", "starts = np.arange(0, x.shape[1] - block + 1, block)"),
            {"edge", "golden"},
        ),
    ],
    "promoted_sum": [
        (("total += part", "total = narrow(total + part)"), {"whole", "rest", "error", "golden"}),
        (("part = narrow(part + product)", "part = part + product"), {"short", "whole", "rest", "golden"}),
        (
            (
                "for start in range(0, len(products), interval):",
                "for start in range(0, len(products) - interval + 1, interval):",
            ),
            {"short", "rest", "golden"},
        ),
    ],
    "all_to_all": [
        (("y[r][t] += weights[r][t, k] * row", "y[r][t] = weights[r][t, k] * row"), {"several", "golden"}),
        (("weights[r][t, k] * row", "row"), {"one_expert", "several", "idle", "golden"}),
        (
            (
                "rows = exchange([[x[r][slots[r][s][:, 0]] for s in ranks] for r in ranks])",
                "exchange([[x[r]] * len(x) for r in ranks])\n"
                "    rows = exchange([[x[r][slots[r][s][:, 0]] for s in ranks] for r in ranks])",
            ),
            {"bytes"},
        ),
    ],
    "pack_experts": [
        (('np.argsort(-weight, kind="stable")', 'np.argsort(weight, kind="stable")'), {"greedy", "golden"}),
        (("np.where(filled < len(weight) // packs, load, np.inf).argmin()", "load.argmin()"), {"room", "golden"}),
        (("(weight / replicas_of_expert).argmax()", "weight.argmax()"), {"replicas", "golden"}),
    ],
    "schedule": [
        (("warm_up = min(ranks - 1 - rank, chunks)", "warm_up = chunks"), {"memory", "golden"}),
        (("warm_up = min(ranks - 1 - rank, chunks)", "warm_up = 0"), {"bubble", "golden"}),
        (
            ("for c in range(chunks - warm_up, chunks)]", "for c in range(chunks - warm_up, chunks - 1)]"),
            {"complete", "runs", "memory", "bubble", "golden"},
        ),
        (
            ('row += [("F", 0, warm_up + c), ("B", 0, c)]', 'row += [("B", 0, c), ("F", 0, warm_up + c)]'),
            {"runs", "bubble", "golden"},
        ),
    ],
    "measure_decode": [
        (("np.geomspace(1, 1024, 60)", "np.geomspace(1, 1024, 9)"), {"crossing"}),
        (("np.geomspace(1, 1024, 60)", "np.geomspace(64, 1024, 60)"), {"range"}),
        (('recomputed=flops["recomputed"]', 'recomputed=flops["materialised"]'), {"recomputed", "crossing"}),
    ],
    "measure_balance": [
        (("speeds = [0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]", "speeds = [0.0, 0.01, 0.1, 1.0]"), {"best"}),
        (("load[-50:]", "load[:50]"), {"max_vio"}),
        (
            ("speeds = [0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]", "speeds = [0.0, 0.001, 0.003, 0.01]"),
            {"sweep"},
        ),
    ],
}


@pytest.mark.parametrize("name, change, expected", [(name, *row) for name, rows in WRONG.items() for row in rows])
def test_wrong_solution_loses_exactly_what_it_breaks(name, change, expected, tmp_path):
    found = solution_of(name, tmp_path, change)
    assert lost(name, found.submission, found.variant) == expected


def test_every_implement_and_measure_exercise_has_wrong_solutions():
    assert set(WRONG) == {name for name, e in catalogue().items() if e.kind in "IM"}
    assert all(len(rows) >= 2 for rows in WRONG.values())
    assert all(lost for rows in WRONG.values() for _, lost in rows)
