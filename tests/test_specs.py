"""Facts of machines: each has a source, Table 5 comes back, and files with units are read or refused by name."""

import dataclasses
import json

import pytest

from minidsv3.hardware.specs import CLUSTERS, CX7, CX8, FABRICS, GPUS, INFINIBAND, NVLINK, ROCE, quantity, read_cluster

EVERYTHING = [*GPUS.values(), CX7, CX8, *FABRICS.values(), *CLUSTERS.values()]


@pytest.mark.parametrize("spec", EVERYTHING, ids=lambda spec: spec.name)
def test_every_number_has_a_source(spec):
    numbers = {f.name for f in dataclasses.fields(spec) if "unit" in f.metadata}
    assert numbers <= spec.sources.keys()
    assert all(getattr(spec, name) >= 0 for name in numbers)


def test_latencies_are_those_of_table_5():
    """Insights into DeepSeek-V3, Table 5, microseconds: one switch, three switches."""
    assert [INFINIBAND.latency(n) * 1e6 for n in (1, 3)] == pytest.approx([2.8, 3.7])
    assert [ROCE.latency(n) * 1e6 for n in (1, 3)] == pytest.approx([3.6, 5.6])
    assert NVLINK.latency(1) * 1e6 == pytest.approx(3.33)


def test_latency_of_other_networks():
    """FT3 5 switches, Dragonfly 4."""
    assert [INFINIBAND.latency(n) * 1e6 for n in (5, 4)] == pytest.approx([4.6, 4.15])
    assert [ROCE.latency(n) * 1e6 for n in (5, 4)] == pytest.approx([7.6, 6.6])


@pytest.mark.parametrize("text, unit, expected", [
    ("400 Gb/s", "B/s", 50e9), ("50 GB/s", "B/s", 50e9), ("80 GB", "B", 80e9), ("80GiB", "B", 80 * 2**30),
    ("989 TFLOP/s", "FLOP/s", 989e12), ("0.45 us", "s", 0.45e-6), ("132 SM", "SM", 132), ("2 USD/h", "USD/h", 2),
])  # fmt: skip
def test_quantity_reads_prefix_and_unit(text, unit, expected):
    assert quantity(text, unit) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["50", 50, "50 GB", "50 XB/s", "-1 GB/s", "inf B/s", "1e5e5 B/s", None, "B/s"])
def test_quantity_refuses_numbers_without_the_unit(text):
    with pytest.raises(ValueError, match="unit"):
        quantity(text, "B/s")


def write(tmp_path, content):
    path = tmp_path / "my.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_file_changes_what_it_names_and_keeps_the_rest(tmp_path):
    path = write(tmp_path, {"name": "mine", "base": "h100", "gpu": {"memory_bytes": "96 GB"},
                            "nic": {"bytes_per_second": "800 Gb/s"}, "gpus_per_node": "4 GPU"})  # fmt: skip
    mine, base = read_cluster(path), CLUSTERS["h100"]
    assert (mine.name, mine.gpu.memory_bytes, mine.nic.bytes_per_second, mine.gpus_per_node) == ("mine", 96e9, 100e9, 4)
    assert mine.gpu.bf16_flops_per_second == base.gpu.bf16_flops_per_second
    assert mine.gpu.sources["memory_bytes"] == str(path)
    assert mine.gpu.sources["sms"] == base.gpu.sources["sms"]


def test_example_of_the_documentation_is_a_file(tmp_path):
    import minidsv3.hardware.specs as specs

    lines = [line.rsplit("    ", 1)[0] if "NVLink\n" in line + "\n" or "not said" in line else line
             for line in specs.__doc__.splitlines()]  # fmt: skip
    text = "\n".join(lines)
    text = text[text.index("{") : text.index('"2 USD/h"}') + len('"2 USD/h"}')]
    cluster = read_cluster(write(tmp_path, text))
    assert cluster == dataclasses.replace(
        CLUSTERS["h800"],
        name="my cluster",
        gpu=dataclasses.replace(CLUSTERS["h800"].gpu, sources=cluster.gpu.sources),
        nic=dataclasses.replace(CLUSTERS["h800"].nic, sources=cluster.nic.sources),
        sources=cluster.sources,
    )


@pytest.mark.parametrize("content, named", [
    ({"gpu": {"sms": 132}}, "sms"), ({"gpu": {"memory": "80 GB"}}, "memory"), ({"base": "h900"}, "h900"),
    ({"nic": {"bytes_per_second": "400 GB"}}, "bytes_per_second"), ({"gpus": "8 GPU"}, "gpus"), ("[1]", "object"),
    ("{", "not JSON"), ({"gpu": 3}, "object"),
])  # fmt: skip
def test_file_with_a_mistake_is_refused_and_the_field_named(tmp_path, content, named):
    with pytest.raises(ValueError, match=named):
        read_cluster(write(tmp_path, content))
