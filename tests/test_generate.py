"""`generate`: greedy against the argmax loop, batches against single prompts, stops, streams, and what is refused."""

import importlib
import json

import numpy as np
import pytest
from reference_model import ODD, odd_model, odd_tokens
from small_runs import new_model

from minidsv3 import save_pretrained
from minidsv3.commands import main
from minidsv3.generation import Generation, generate
from minidsv3.generation import generate as generate_function
from minidsv3.generation.generate import Output

V = ODD["vocab_size"]


@pytest.fixture(scope="module")
def model():
    return odd_model(num_nextn_predict_layers=2)


@pytest.fixture(scope="module")
def plain():
    return odd_model(num_nextn_predict_layers=0)


def argmax_loop(model, prompt, n):
    """Greedy without a cache; the two best logits must differ by more than rounding could."""
    tokens = [int(t) for t in prompt]
    for _ in range(n):
        logits = model.logits(np.array([tokens]))[0, -1]
        second, first = np.sort(logits)[-2:]
        assert first - second > 1e-4
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def prompts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, n).tolist() for n in lengths]


@pytest.mark.parametrize("length", [1, 2, 9])
def test_generate_greedy_is_the_argmax_loop(model, length):
    (prompt,) = prompts_of(length, seed=length)
    assert generate(model, [prompt], 12).tokens[0].tolist() == argmax_loop(model, prompt, 12)


def test_generate_of_a_prompt_longer_than_a_chunk(plain, monkeypatch):
    """Prefill in chunks: prompts shorter than, as long as and longer than two chunks."""
    monkeypatch.setattr(importlib.import_module("minidsv3.generation.generate"), "PREFILL", 4)
    prompts = prompts_of(3, 8, 13, 4)
    result = generate(plain, prompts, 6)
    assert [t.tolist() for t in result.tokens] == [argmax_loop(plain, p, 6) for p in prompts]
    assert result.main_passes == 4 + 5


def test_generate_batch_of_different_lengths_is_one_by_one(model):
    prompts = prompts_of(5, 1, 8, 3)
    together = generate(model, prompts, 10)
    assert [t.tolist() for t in together.tokens] == [generate(model, [p], 10).tokens[0].tolist() for p in prompts]


def test_generate_float32_model(model):
    narrow = odd_model(np.float32, num_nextn_predict_layers=2)
    (prompt,) = prompts_of(4)
    assert generate(narrow, [prompt], 8).tokens[0].tolist() == argmax_loop(narrow, prompt, 8)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda p: np.array(p, dtype=np.int16)])
def test_generate_takes_any_integer_sequence(model, kind):
    (prompt,) = prompts_of(4)
    assert generate(model, [kind(prompt)], 5).tokens[0].tolist() == generate(model, [prompt], 5).tokens[0].tolist()


@pytest.mark.parametrize("speculative", [False, True])
def test_generate_returns_what_it_measured(model, speculative):
    result = generate(model, prompts_of(4, 2), 5, speculative=speculative)
    assert isinstance(result, Generation)
    assert [(t.dtype, t.shape) for t in result.tokens] == [(np.dtype(np.int64), (5,))] * 2
    assert result.seconds > 0 and result.tokens_per_second == 10 / result.seconds
    assert result.cache_bytes_per_token == 2 * (ODD["kv_lora_rank"] + ODD["qk_rope_head_dim"]) * 8
    assert len(result.accepted_by_depth) == len(result.drafted_by_depth) == (2 if speculative else 0)


def test_generate_passes_the_model_once_a_token(model):
    assert generate(model, prompts_of(4, 2), 5).main_passes == 5


@pytest.mark.parametrize("speculative", [False, True])
def test_generate_of_no_tokens_is_empty(model, speculative):
    seen = []
    result = generate(model, prompts_of(4, 2), 0, speculative=speculative, stream=lambda *a: seen.append(a))
    assert [t.tolist() for t in result.tokens] == [[], []] and seen == []
    assert result.tokens[0].dtype == np.int64


def test_generate_leaves_the_prompts_alone(model):
    prompt = np.array([1, 2, 3])
    generate(model, [prompt], 3)
    assert prompt.tolist() == [1, 2, 3]


@pytest.mark.parametrize("speculative", [False, True])
def test_generate_same_seed_same_tokens(model, speculative):
    runs = [
        generate(model, prompts_of(3), 12, temperature=1.0, rng=np.random.default_rng(s), speculative=speculative)
        for s in (5, 5, 6)
    ]
    a, b, c = (run.tokens[0].tolist() for run in runs)
    assert a == b != c


def test_generate_with_a_tiny_top_p_is_greedy(model):
    greedy = generate(model, prompts_of(3), 8).tokens[0].tolist()
    rng = np.random.default_rng(0)
    assert generate(model, prompts_of(3), 8, temperature=2.0, top_p=1e-9, rng=rng).tokens[0].tolist() == greedy


@pytest.mark.parametrize("speculative", [False, True])
def test_generate_streams_each_final_token_once_and_in_order(model, speculative):
    seen = {0: [], 1: [], 2: []}
    result = generate(
        model, prompts_of(4, 2, 6), 7, speculative=speculative, stream=lambda i, token: seen[i].append(token)
    )
    assert [seen[i] for i in range(3)] == [t.tolist() for t in result.tokens]
    assert {type(token) for tokens in seen.values() for token in tokens} == {int}


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_generate_ends_before_a_stop_sequence(model, speculative, length):
    prompts = prompts_of(4, 7)
    free = generate(model, prompts, 12).tokens[0].tolist()
    stop = free[5 : 5 + length]
    seen = []
    result = generate(
        model, prompts, 12, stop=[[V - 1] * 9, stop], speculative=speculative, stream=lambda i, t: seen.append((i, t))
    )
    end = next(i for i in range(12) if free[i : i + length] == stop)
    assert result.tokens[0].tolist() == free[:end] == [t for i, t in seen if i == 0]


def test_generate_batch_goes_on_while_one_sequence_has_stopped(model):
    prompts = prompts_of(4, 7)
    free = [t.tolist() for t in generate(model, prompts, 12).tokens]
    stop = free[0][2:5]
    assert all(free[1][i : i + 3] != stop for i in range(12))
    result = generate(model, prompts, 12, stop=[stop])
    assert result.tokens[0].tolist() == free[0][:2] and result.tokens[1].tolist() == free[1]


def output(limit, stop, tokens):
    """What stays of `tokens`, and how much had been streamed after each."""
    seen, steps = [], []
    out = Output(limit, stop, seen.append)
    for token in tokens:
        out.add(token)
        steps.append(list(seen))
    return out, steps


def test_output_holds_back_what_may_become_a_stop():
    out, steps = output(9, [[1, 2, 3]], [7, 1, 2, 5, 1, 2, 3])
    assert steps == [[7], [7], [7], [7, 1, 2, 5], [7, 1, 2, 5], [7, 1, 2, 5], [7, 1, 2, 5]]
    assert out.tokens == [7, 1, 2, 5] and out.done


def test_output_holds_back_for_the_longest_of_overlapping_stops():
    _, steps = output(9, [[2, 9], [1, 2, 9]], [5, 1, 2, 4])
    assert steps == [[5], [5], [5], [5, 1, 2, 4]]


def test_output_stop_inside_a_longer_stop_comes_first():
    out, steps = output(9, [[1, 2, 3], [2]], [1, 2])
    assert out.tokens == [1] == steps[-1] and out.done


def test_output_stop_that_begins_like_itself():
    """1 1 2 in 1 1 1 2: the match begins at the second 1."""
    out, steps = output(9, [[1, 1, 2]], [1, 1, 1, 2])
    assert out.tokens == [1] and steps == [[], [], [1], [1]]


def test_output_stop_longer_than_the_output_releases_what_was_held_back():
    out, steps = output(2, [[1, 2, 3]], [1, 2])
    assert out.tokens == [1, 2] == steps[-1] and steps[0] == [] and out.done


def test_output_stop_at_once_leaves_nothing():
    out, steps = output(5, [[4]], [4])
    assert out.tokens == [] == steps[-1] and out.done


def test_output_takes_nothing_when_done():
    out, steps = output(2, [], [1, 2, 3, 4])
    assert out.tokens == [1, 2] == steps[-1]


def test_generate_with_a_stop_that_is_never_said(model):
    free = generate(model, prompts_of(4), 8).tokens[0].tolist()
    assert generate(model, prompts_of(4), 8, stop=[list(range(20))]).tokens[0].tolist() == free


@pytest.mark.parametrize("stop", [None, []])
def test_generate_without_stops(model, stop):
    assert len(generate(model, prompts_of(4), 8, stop=stop).tokens[0]) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=[]), "no prompts"),
        (dict(prompts=[[1], []]), "prompt 1 must be a 1-D sequence of at least one token"),
        (dict(prompts=[[[1, 2]]]), r"prompt 0 must be a 1-D sequence"),
        (dict(prompts=[[1.0, 2.0]]), "prompt 0 must be a 1-D sequence"),
        (dict(prompts=[[True]]), "prompt 0 must be a 1-D sequence"),
        (dict(prompts=[[3], [V]]), f"prompt 1 has a token outside the vocabulary of {V}"),
        (dict(prompts=[[-1]]), "prompt 0 has a token outside"),
        (dict(max_new_tokens=-1), "max_new_tokens=-1 is negative"),
        (dict(temperature=-0.5), "temperature=-0.5 must be >= 0"),
        (dict(temperature=float("nan")), "temperature=nan must be"),
        (dict(temperature=1.0), "temperature=1.0 draws at random: give an rng"),
        (dict(top_p=0.0), r"top_p=0.0 in \(0, 1\]"),
        (dict(top_p=1.5), r"top_p=1.5 in \(0, 1\]"),
        (dict(stop=[[1], []]), "a stop sequence is empty"),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else "",
)
def test_generate_refuses(model, change, message):
    given = {"prompts": [[1, 2]], "max_new_tokens": 3, **change}
    with pytest.raises(ValueError, match=message):
        generate(model, given.pop("prompts"), given.pop("max_new_tokens"), **given)


def test_generate_refuses_speculation_without_mtp_modules(plain):
    with pytest.raises(ValueError, match="speculative decoding needs MTP modules"):
        generate(plain, [[1, 2]], 3, speculative=True)


def test_generate_is_a_public_name():
    import minidsv3

    assert minidsv3.generate is generate_function


def test_generate_does_not_depend_on_who_else_is_in_the_batch(model):
    tokens = odd_tokens(3, 6)
    alone = generate(model, [tokens[1]], 9).tokens[0].tolist()
    assert generate(model, list(tokens), 9).tokens[1].tolist() == alone


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released-format directory of a byte model with an MTP module."""
    model = new_model(seed=4)
    for parameter in model.parameters():
        parameter.data *= 5  # far from uniform
    folder = tmp_path_factory.mktemp("released") / "model"
    save_pretrained(model, folder)
    return folder


def said(capsys, folder, *more):
    arguments = ["generate", str(folder), "--prompt", "to be", "--max-new-tokens", "12", "--temperature", "0", *more]
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_generate_command_on_a_released_directory_measures(released, capsys):
    found = json.loads(said(capsys, released, "--json", "--speculative"))
    assert len(found["tokens"]) == 12 and found["seconds"] > 0
    assert found["tokens_per_second"] == pytest.approx(12 / found["seconds"])
    assert found["cache_bytes_per_token"] == 2 * (6 + 2) * 4  # small_runs: two layers, rank 6 and 2 for RoPE, float32
    assert len(found["accepted_by_depth"]) == len(found["acceptance_by_depth"]) == 1 <= found["main_passes"]


def test_generate_command_speculative_says_the_same(released, capsys):
    plain, fast = (json.loads(said(capsys, released, "--json", *more)) for more in ([], ["--speculative"]))
    assert plain["text"] == fast["text"] and plain["tokens"] == fast["tokens"]


@pytest.mark.parametrize("more", [[], ["--speculative"]])
def test_generate_command_streams_the_same_text(released, capsys, more):
    assert said(capsys, released, "--stream", *more) == said(capsys, released, *more)


def test_generate_command_speculative_without_mtp_is_an_error(tmp_path, capsys):
    save_pretrained(odd_model(np.float32, num_nextn_predict_layers=0, vocab_size=257), tmp_path / "m")
    assert main(["generate", str(tmp_path / "m"), "--speculative"]) == 2
    assert "speculative decoding needs MTP modules" in capsys.readouterr().err
