"""The limit of expert parallelism is exact arithmetic; prefill and decode move as their parts do."""

import dataclasses

import pytest

from minidsv3.config import ModelConfig
from minidsv3.hardware.clock import Setup
from minidsv3.hardware.kernels import shape_of
from minidsv3.hardware.messages import Traffic
from minidsv3.hardware.serving import decode, expert_parallel_limit, prefill

V3 = shape_of(ModelConfig.preset("deepseek-v3"))
DECODE = Setup(V3, gpus=144, pipeline_ranks=1, expert_ranks=144, redundant_experts=32)
PREFILL = Setup(V3, gpus=32, pipeline_ranks=1, expert_ranks=32, redundant_experts=32, traffic=Traffic(3.12, 6.85))


@pytest.mark.parametrize(
    "bandwidth, us, ms, tokens", [(50e9, 120.96, 14.75712, 67.76), (900e9, 6.72, 0.81984, 1219.75)]
)
def test_limit_is_the_papers(bandwidth, us, ms, tokens):
    """Insights into DeepSeek-V3, section 2.3.2."""
    limit = expert_parallel_limit(bandwidth)
    assert limit.communication_seconds == pytest.approx(us * 1e-6, rel=1e-12)
    assert limit.layer_seconds == 2 * limit.communication_seconds
    assert limit.token_seconds == pytest.approx(ms * 1e-3, rel=1e-12)
    assert limit.tokens_per_second == pytest.approx(tokens, abs=0.005)


def test_limit_with_the_exact_width():
    """7168 instead of 7K: 123.86 us and 66.2 tokens/s."""
    limit = expert_parallel_limit(50e9, hidden_size=7168)
    assert limit.communication_seconds * 1e6 == pytest.approx(123.86, abs=0.005)
    assert limit.tokens_per_second == pytest.approx(66.2, abs=0.05)
    with pytest.raises(ValueError, match="positive"):
        expert_parallel_limit(0)


def test_decode_is_near_the_service():
    """Day 6: 1,850 tokens/s and GPU, 20 to 22 tokens/s a user, mean context 4,989."""
    served = decode(DECODE, 88, 4989)
    assert served.tokens_per_second == pytest.approx(1850, rel=0.15)
    assert served.tokens_per_second == 88 / served.step_seconds


def test_decode_reads_more_cache_for_longer_contexts():
    """A token of a request is 576 BF16 numbers in each layer."""
    short, long = (decode(DECODE, 64, n) for n in (4000, 8000))
    more = 64 * 4000 * 576 * 2 / (0.468 * 3.35e12)
    assert long.compute_seconds - short.compute_seconds == pytest.approx(more, rel=1e-6)


def test_decode_hides_the_shorter_of_computation_and_messages():
    hidden = decode(DECODE, 88, 4989)
    exposed = decode(dataclasses.replace(DECODE, overlap=False), 88, 4989)
    assert hidden.compute_seconds > hidden.communication_seconds  # so the messages are hidden
    assert exposed.step_seconds - hidden.step_seconds == pytest.approx(58 * hidden.communication_seconds)


def test_prefill_is_linear_in_prompts_and_bound_by_the_slower_part():
    one, three = prefill(PREFILL, 1), prefill(PREFILL, 3)
    assert three.step_seconds == pytest.approx(3 * one.step_seconds)
    slow = dataclasses.replace(PREFILL, links=PREFILL.links.faster(infiniband=0.25))
    assert prefill(slow, 1).step_seconds == pytest.approx(
        58 * prefill(slow, 1).communication_seconds + 3 * one.compute_seconds
    )
