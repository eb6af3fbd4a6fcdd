"""Reading npu-smi: samples after the documented format of 910B and A3, and damaged ones."""

from __future__ import annotations

import pytest
from doctor_hosts import sample

from ascend_kit.device.npu_smi import Chip, SmiProcess, parse_info, parse_topo


def test_table_of_a_910b_machine_gives_every_card_with_its_memory():
    info = parse_info(sample("info_910b"))

    assert info.version == "25.5.1"
    assert [chip.npu for chip in info.chips] == list(range(8))
    assert info.chips[2] == Chip(
        npu=2,
        chip=0,
        name="910B3",
        health="OK",
        phy_id=None,
        power_w=92.7,
        temperature_c=40.0,
        aicore_percent=0.0,
        hbm_used_mb=3376,
        hbm_total_mb=65536,
    )
    assert info.processes == ()


def test_table_of_an_a3_machine_gives_two_chips_a_card_and_their_physical_ids():
    info = parse_info(sample("info_a3"))

    assert [(chip.npu, chip.chip, chip.phy_id) for chip in info.chips[:4]] == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 2),
        (1, 1, 3),
    ]
    assert info.chips[0].power_w == 171.2
    assert info.chips[1].power_w is None  # printed as "-"
    assert {chip.hbm_total_mb for chip in info.chips} == {65536}


def test_processes_are_read_even_without_a_name():
    info = parse_info(sample("info_910b4_busy"))

    assert info.processes == (SmiProcess(1, 0, 40112, "python3", 21560), SmiProcess(2, 0, 40340, "", 134))
    assert [chip.npu for chip in info.chips if not chip.is_healthy] == [3]


def test_wider_table_with_a_container_pid_column_is_read():
    text = (
        sample("info_910b4_busy")
        .replace("| Process memory(MB)      |", "| Process memory(MB)      | Process id in container |")
        .replace("| 21560                   |", "| 21560                   | 77                      |")
    )

    assert parse_info(text).processes[0] == SmiProcess(1, 0, 40112, "python3", 21560)


def test_card_without_numbers_gives_none_and_not_zero():
    text = sample("info_910b").replace("93.4        41 ", "NA          -  ").replace("3384 / 65536", "-    / -    ")

    chip = parse_info(text).chips[3]

    assert (chip.power_w, chip.temperature_c, chip.hbm_used_mb, chip.hbm_total_mb) == (None, None, None, None)


def test_table_cut_off_in_the_middle_keeps_the_complete_cards():
    lines = sample("info_910b").splitlines()[:10]  # ends after the first line of the second card

    assert [chip.npu for chip in parse_info("\n".join(lines)).chips] == [0]


@pytest.mark.parametrize("text", ["", "dcmi module initialize failed. ret is -8005", "| a | b |\n"])
def test_other_text_is_refused_with_its_beginning(text):
    with pytest.raises(ValueError, match="not an `npu-smi info` table"):
        parse_info(text)


def test_topology_of_a_910b_machine_is_a_full_mesh():
    links = parse_topo(sample("topo_910b"))

    assert len(links) == 8 * 7
    assert set(links.values()) == {"HCCS"}


def test_topology_of_an_a3_machine_has_its_own_links():
    links = parse_topo(sample("topo_a3"))

    assert links[0, 1] == "SIO" and links[0, 2] == "HCCS_SW"


def test_text_without_a_matrix_gives_no_links():
    assert parse_topo("This device does not support querying topo.") == {}
