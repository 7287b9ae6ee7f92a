"""Pictures of the experts: they fit, mean what they say, and are safe to send."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.style import Style
from rich.text import Text
from support.routed import drawn, observation, tokens

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.experts.activity import Activity, LayerActivity, activity_of, differences
from dsmoe_local.experts.heatmap import COLOURS, Heatmap, grid_of, scale_of
from dsmoe_local.experts.panel import live_panel, panels, reply_panel
from dsmoe_local.experts.picture import activity_json, as_svg, write_picture
from dsmoe_local.experts.tables import COLUMNS, difference_table, expert_table, layer_table

SYSTEMS = ("truecolor", "256", "standard", None)
BIG = activity_of(observation(tokens(60, 27, 64, 6), 27, 64))
MANY = [replace(token, probabilities=[[0.3] * 6] * 27, shared=0.0) for token in tokens(60, 27, 64, 6)]


def grouped() -> Activity:
    """Of a model with sigmoid routers, groups, and a gate but no shared experts."""
    seen = observation(MANY, 27, 64, gating="sigmoid", n_groups=4)
    seen["layers"] = [{**layer, "shared_gate": 0.25} for layer in seen["layers"]]
    return activity_of(seen)


GROUPED = grouped()
SMALL = activity_of(observation(tokens(60, 29, 14, 12, seed=1), 29, 14))


def cells(line: str) -> int:
    return cell_len(Text.from_ansi(line).plain)


@settings(max_examples=60)
@given(st.integers(20, 200), st.sampled_from(SYSTEMS), st.booleans(), st.booleans())
def test_nothing_is_wider_than_the_screen(width: int, system: Any, tall: bool, big: bool) -> None:
    """Guards: rows that the terminal breaks, which ruins a picture and a live panel's height."""
    activity = BIG if big else SMALL
    parts = {"last reply": activity, "session": activity + activity}
    for renderable in (
        Heatmap(activity, tall=tall),
        reply_panel(activity, width, 40),
        panels(parts, width, tall=tall),
        live_panel(activity, width, 40),
        layer_table(activity, width),
        expert_table({name: part.layers[3] for name, part in parts.items()}, width),
        difference_table(differences(activity, activity, 3), ("a" * 90, "b"), width),
    ):
        lines = drawn(renderable, width, color_system=system)
        assert max(map(cells, lines)) <= width
        cut = [line for line in lines if "…" in line and "aaa" not in line]
        assert width < 40 or not cut


@pytest.mark.parametrize("height", [2, 8, 24, 60])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_live_panel_is_a_third_of_the_screen(height: int, system: Any) -> None:
    """Guards: a panel that pushes the reply off a small screen."""
    lines = drawn(live_panel(BIG, 80, height), color_system=system)
    assert len(lines) <= max(1, height // 3)
    assert "60 tokens" in lines[0]


def test_a_reply_stays_in_sight() -> None:
    """Guards: shades, which take a line for each layer, on a small screen."""
    for system in SYSTEMS:
        assert len(drawn(reply_panel(SMALL, 80, 24), color_system=system)) <= 20


def test_shades_stand_for_shares() -> None:
    """Guards: a picture that is turned, mirrored, or shaded the wrong way round."""
    seen = tokens(1, 2, 4, 1)
    always = activity_of(
        observation([type(seen[0])([[2], [0]], [[0.5], [0.5]])] * 5, n_layers=2, n_experts=4)
    )
    lines = drawn(Heatmap(always, tall=True, legend=False), 40)
    assert lines == ["   0   1   2   3", "1 |        ████    |", "2 |████            |"]
    halves = drawn(Heatmap(always, legend=False), 40, color_system="truecolor")
    low, high = (tuple(int(COLOURS[end][at : at + 2], 16) for at in (1, 3, 5)) for end in (0, -1))
    assert len(halves) == 2
    styles = [span.style for span in Text.from_ansi(halves[1]).spans]
    spans = [
        (style.color and style.color.triplet, style.bgcolor.triplet)
        for style in styles
        if isinstance(style, Style) and style.bgcolor is not None
    ]
    # The upper half of a cell is layer 1.
    assert spans == [(low, high), (low, low), (high, low), (low, low)]


def test_the_scale_is_said() -> None:
    """Guards: colours that nobody can read a number from, and cells that stand for several without a word."""
    last = drawn(Heatmap(BIG), 80)[-1]
    assert re.search(r"0%.* even .*\d+%  of the tokens", last)
    narrow = "\n".join(drawn(Heatmap(BIG, height=10), 40))
    assert "mean of 3 layers to a row" in narrow
    assert "mean of 2 experts to a column" in narrow


@pytest.mark.parametrize(("n_experts", "per_token"), [(8, 2), (64, 6), (14, 12), (14, 13), (4, 4)])
def test_an_even_load_looks_even(n_experts: int, per_token: int) -> None:
    """Guards: experts that all have their part, drawn as the busiest, beside a scale that calls another
    shade even.
    """
    counts = (per_token * 100,) * n_experts
    layers = [LayerActivity(number, n_experts * 100, counts, (1.0,) * n_experts) for number in (1, 2)]
    even = Activity(tuple(layers))
    shaded = drawn(Heatmap(even, tall=True), 80)
    assert set(shaded[1]) == set("1 |▒")
    assert re.search(rf"\|▒\| {per_token / n_experts:.0%} even", "  ".join(shaded))
    scale = scale_of([even], [grid_of(even, 10, 100)])
    assert scale.level(per_token / n_experts, 10) in (4, 5)
    # The busiest are told from it: all that a share can be has a shade.
    assert scale.level(1.0, 5) == 4 or per_token == n_experts
    assert scale.level(0.0, 5) == 0


def test_no_colour_means_none() -> None:
    """Guards: NO_COLOR and pipes that get a picture in colours, or an empty one."""
    for lines in (drawn(Heatmap(BIG), 80, color_system="truecolor", no_color=True), drawn(Heatmap(BIG), 80)):
        assert not any("\x1b[3" in line or "\x1b[4" in line or "38;" in line for line in lines)
        assert any("▓" in line for line in lines)


def test_pictures_stand_beside_each_other_where_they_fit() -> None:
    """Guards: experts that share a column although below there was room for all."""
    parts = {"last reply": BIG, "session": BIG}
    wide, narrow = (drawn(panels(parts, width), width) for width in (150, 80))
    assert re.search("last reply.*session", wide[0])
    assert len(narrow) > 2 * 27
    assert "mean of" not in "\n".join([*wide, *narrow])


def test_nothing_seen_is_said() -> None:
    """Guards: a division by no tokens."""
    for renderable in (panels({"session": Activity()}, 80), Heatmap(Activity())):
        assert "no tokens" in "\n".join(drawn(renderable))
    assert "0 tokens" in drawn(live_panel(Activity(), 80, 40))[0]


def test_wide_tables_have_all_columns() -> None:
    """Guards: a column of the documentation that no width ever shows."""
    shown = [drawn(layer_table(activity, 120), 120)[1] for activity in (BIG, GROUPED)]
    assert all(any(column.heading in head for head in shown) for column in COLUMNS)
    # Columns have the reply's own width; only the text below is wrapped.
    assert "busiest" in shown[0]


def test_what_only_some_models_have() -> None:
    """Guards: sigmoids shown as a share of 1; groups and gates that are not shown, or shown as 0%."""
    lines = drawn(layer_table(GROUPED, 120), 120)
    captured = GROUPED.layers[0].captured_mass
    assert captured > 1
    assert lines[1].split() == ["layer", "mass", "even", "gate", "peak", "unused", "nats", "busiest"]
    assert lines[3].split()[1:4:2] == [f"{captured:.2f}", "25%"]
    assert "each from 0 to 1" in " ".join(lines)
    assert (
        f"mass {GROUPED.captured_mass:.2f} · even {GROUPED.load_entropy:.2f} · gate 25%"
        in drawn(live_panel(GROUPED, 120, 40), 120)[0]
    )
    heatmap = drawn(Heatmap(GROUPED), 100)
    assert heatmap[0].split() == ["0", "16", "32", "48"]
    assert "4 groups of 16 experts" in heatmap[-1]
    notes = " ".join(drawn(expert_table({"reply": GROUPED.layers[0]}, 300), 300)[-1:])
    shares = ", ".join(f"{share:.0%}" for share in GROUPED.layers[0].group_shares)
    assert f"choices by group: {shares}" in notes
    assert sum(GROUPED.layers[0].group_shares) == pytest.approx(1)
    found = activity_json(GROUPED)
    assert (found["gating"], found["n_groups"], found["shared_gate"]) == ("sigmoid", 4, 0.25)
    assert found["shared_share"] is None
    later = activity_of(observation(MANY, 27, 64, gating="sigmoid", n_groups=4))
    assert (later - later).is_sigmoid
    assert (Activity() + later).n_groups == 4


def test_svg_is_whole_safe_and_asks_for_nothing(tmp_path: Path) -> None:
    """Guards: a name that is markup in a page, and fonts that tell a server who looks."""
    path = tmp_path / "experts.svg"
    write_picture(path, "<script>x</script>\x1b[31m & co", {"a.txt]]> \x07<b>": SMALL})
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert not [tag for tag in root.iter() if "script" in tag.tag]
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in re.sub(r"url\(#", "", text)
    said = "".join(root.itertext()).replace("\xa0", " ")
    assert "<script>x</script>␛[31m & co" in said
    assert "a.txt]]> ␇<b>" in said
    filled = {tag.get("fill") for tag in root.iter() if tag.tag.endswith("rect")}
    assert len(filled & set(COLOURS)) >= 5


def test_svg_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: an export in shades of grey because the chat runs without colours."""
    plain = as_svg("m", {"session": SMALL})
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb"), ("COLUMNS", "40")):
        monkeypatch.setenv(name, value)
    assert as_svg("m", {"session": SMALL}) == plain


def test_json_has_the_observers_numbers(tmp_path: Path) -> None:
    """Guards: an export that rounds, or counts otherwise than the observer."""
    seen = observation(tokens(30))
    write_picture(tmp_path / "experts.json", "m", {"last reply": activity_of(seen)})
    found = json.loads((tmp_path / "experts.json").read_text())
    assert found["model"] == "m"
    for layer, expected in zip(found["parts"]["last reply"]["layers"], seen["layers"], strict=True):
        for name in set(expected) - {"routed_norm", "shared_norm"}:
            assert layer[name] == pytest.approx(expected[name]), name


def test_a_picture_needs_a_known_ending_something_seen_and_a_place(tmp_path: Path) -> None:
    """Guards: an empty file, one of an unknown kind, a traceback of a full or missing folder."""
    with pytest.raises(UsageError, match="unknown format"):
        write_picture(tmp_path / "experts.png", "m", {"session": SMALL})
    with pytest.raises(UsageError, match="no tokens"):
        write_picture(tmp_path / "experts.svg", "m", {"session": Activity()})
    with pytest.raises(FileError, match="cannot be written"):
        write_picture(tmp_path / "none" / "experts.svg", "m", {"session": SMALL})
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_written_as_other_exports_are(tmp_path: Path) -> None:
    """Guards: a picture of a private talk that all can read; a link replaced by a file; a device."""
    path, target = tmp_path / "experts.json", tmp_path / "target"
    target.write_text("old")
    path.symlink_to(target)
    write_picture(path, "m", {"session": SMALL})
    assert path.is_symlink()
    assert json.loads(target.read_text())["model"] == "m"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    folder = tmp_path / "folder.svg"
    folder.mkdir()
    for no_file in (folder, tmp_path / "nul\0.svg"):
        with pytest.raises(FileError):
            write_picture(no_file, "m", {"session": SMALL})


def test_documentation_names_every_number() -> None:
    """Guards: a column or a field that nobody can know the meaning of."""
    text = (Path(__file__).parents[2] / "docs" / "experts.md").read_text(encoding="utf-8")
    fields = activity_json(BIG)
    names = {*fields, *fields["layers"][0]} - {"layers", "layer", "n_routed_experts"}
    assert {name for name in names if f"`{name}`" not in text} == set()
    assert {column.heading for column in COLUMNS if f"| {column.heading} |" not in text} == set()
