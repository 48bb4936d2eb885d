"""Colours of states and kinds of panels, shared by all dashboards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as dashboard_builder
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

GREEN, ORANGE, RED, GREY = "green", "orange", "red", "#8e8e8e"
Colours = Mapping[str, str]
SPENT: Colours = {
    "training": "green", "evaluating": "light-green", "saving": "blue", "restoring": "light-blue",
    "starting": "yellow", "recovering": "red", "redoing": "orange", "holding": "purple", "queued": GREY,
    "suspended": "#5a5a5a",
}  # fmt: skip
"""Goodput states."""
PHASES: Colours = {
    "Training": "green", "Starting": "yellow", "Pending": GREY, "Recovering": "red", "Holding": "purple",
    "Suspended": "#5a5a5a", "Succeeded": "blue", "Failed": "dark-red",
}  # fmt: skip
WORKERS: Colours = {
    "Training": "green", "Starting": "yellow", "Joined": "light-blue", "Leaving": "purple", "Ended": GREY,
    "Lost": "red",
}  # fmt: skip
RECOVERY: Colours = {
    "detect": "red", "reform": "orange", "restart": "yellow", "restore": "light-blue", "first_step": "green",
}  # fmt: skip
CAUSES: Colours = {
    "WorkerLost": "red", "WorkerSilent": "orange", "RankFailed": "purple", "Hang": "yellow",
    "CheckpointRejected": "dark-red", "NumberTaken": "blue", "Disagreement": "light-blue",
}  # fmt: skip
STEP: Colours = {
    "data": "yellow", "compute": "green", "reduce": "orange", "optimizer": "blue", "stall": "purple", "other": GREY,
}  # fmt: skip
"""Parts of a step's time."""
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")


@dataclass(frozen=True)
class Query:
    """Expression and legend of its series."""

    expr: str
    legend: str = ""
    instant: bool = False

    def target(self, number: int, form: PromQueryFormat | None = None) -> prometheus.Dataquery:
        """Build Grafana's query; ids within a panel are A, B, C."""
        made = prometheus.Dataquery().expr(self.expr).ref_id(_letter(number)).datasource(SOURCE)
        made = made.instant() if self.instant else made.range()
        if form is not None:
            made = made.format(form)
        return made.legend_format(self.legend) if self.legend else made


Thresholds = Sequence[tuple[float | None, str]]
"""Pairs of lower bound and colour; the first bound is None."""


def _framed(panel: Any, title: str, description: str, unit: str, span: int, height: int) -> Any:
    panel = panel.title(title).description(description).datasource(SOURCE).span(span).height(height)
    return panel.unit(unit) if unit else panel


def _thresholds(steps: Thresholds) -> dashboard_builder.ThresholdsConfig:
    values = [model.Threshold(value=value, color=colour) for value, colour in steps]
    return dashboard_builder.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(values)


def number(
    title: str,
    description: str,
    query: Query,
    unit: str = "",
    thresholds: Thresholds = ((None, "text"),),
    *,
    span: int = 4,
    decimals: int | None = None,
    names: bool = False,
    mappings: Mapping[str, tuple[str, str]] | None = None,
    trend: bool = True,
    none: str = "–",
    colours: Colours | None = None,
) -> stat.Panel:
    """Build a single number with its recent trend. `names`: show the series' name instead of its value."""
    panel = _framed(stat.Panel(), title, description, unit, span, 4).with_target(query.target(0))
    panel = (
        panel.thresholds(_thresholds(thresholds))
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.AREA if trend and not names else common.BigValueGraphMode.NONE)
        .text_mode(common.BigValueTextMode.NAME if names else common.BigValueTextMode.VALUE)
        .reduce_options(common_builder.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value(none)
    )
    if decimals is not None:
        panel = panel.decimals(decimals)
    if mappings:
        options = {
            value: model.ValueMappingResult(text=text, color=colour) for value, (text, colour) in mappings.items()
        }
        panel = panel.mappings([model.ValueMap(options=options)])
    return _coloured(panel, colours)


def lines(
    title: str,
    description: str,
    queries: Sequence[Query],
    unit: str = "",
    *,
    span: int = 12,
    stacked: bool = False,
    shares: bool = False,
    bars: bool = False,
    log: bool = False,
    limit: float | None = None,
    from_zero: bool = True,
    top: float | None = None,
    colours: Colours | None = None,
) -> timeseries.Panel:
    """Build curves over time. `stacked`: stacked areas; `shares`: stacked to 100 %; `limit`: red line."""
    panel = _framed(timeseries.Panel(), title, description, unit, span, 8)
    for index, query in enumerate(queries):
        panel = panel.with_target(query.target(index))
    panel = _with_legend(_curve_style(panel, areas=stacked or shares, bars=bars))
    if stacked or shares:
        mode = common.StackingMode.PERCENT if shares else common.StackingMode.NORMAL
        panel = panel.stacking(common_builder.StackingConfig().mode(mode).group("A"))
    if log:
        scale = common_builder.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(10)
        panel = panel.scale_distribution(scale)
    elif from_zero:
        panel = panel.min(0)
    if top is not None:
        panel = panel.max(top)
    if limit is not None:
        panel = panel.thresholds(_thresholds(((None, "transparent"), (limit, RED)))).thresholds_style(
            common_builder.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        )
    return _coloured(panel, colours)


def _curve_style(panel: timeseries.Panel, *, areas: bool, bars: bool) -> timeseries.Panel:
    panel = (
        panel.line_width(1 if areas else 2)
        .fill_opacity(80 if bars else 60 if areas else 8)
        .gradient_mode(common.GraphGradientMode.NONE if areas else common.GraphGradientMode.OPACITY)
        .show_points(common.VisibilityMode.NEVER)
    )
    return panel.draw_style(common.GraphDrawStyle.BARS) if bars else panel


def _with_legend(panel: timeseries.Panel) -> timeseries.Panel:
    return panel.legend(
        common_builder.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.TABLE)
        .placement(common.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "mean", "max"])
    ).tooltip(
        common_builder.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
    )


def timeline(
    title: str, description: str, query: Query, colours: Colours, *, span: int = 24, height: int = 5
) -> statetimeline.Panel:
    """Build a state timeline; the query returns 1 for the current state and nothing for others."""
    panel = _framed(statetimeline.Panel(), title, description, "", span, height).with_target(query.target(0))
    legend = common_builder.VizLegendOptions().show_legend(False)
    panel = panel.show_value(common.VisibilityMode.NEVER).merge_values(True).row_height(0.85).legend(legend)
    return _coloured(panel, colours)


def heat(title: str, description: str, query: Query, unit: str, *, span: int = 12) -> heatmap.Panel:
    """Build a heat map of a histogram over time."""
    panel = _framed(heatmap.Panel(), title, description, "", span, 8)
    colours = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(32)
    return (
        panel.with_target(query.target(0, PromQueryFormat.HEATMAP))
        .calculate(False)
        .color(colours)
        .y_axis(heatmap.YAxisConfig().unit(unit))
    )


def columns(
    title: str,
    description: str,
    rows: Query,
    keys: Mapping[str, str],
    by: Mapping[str, tuple[Query, str]],
    *,
    link: tuple[str, str] | None = None,
    height: int = 10,
) -> table.Panel:
    """Build a table.

    The series of `rows` are the rows. Columns are their labels `keys` (label: heading), then `by` (heading: query and
    unit). `link`: heading of a column and the URL of its cells.
    """
    panel = _framed(table.Panel(), title, description, "", 24, height)
    panel = panel.with_target(rows.target(0, PromQueryFormat.TABLE))
    headings = dict(keys)
    for index, (heading, (query, unit)) in enumerate(by.items(), start=1):
        panel = panel.with_target(query.target(index, PromQueryFormat.TABLE))
        headings[f"Value #{_letter(index)}"] = heading
        panel = panel.override_by_name(heading, _cells(unit))
    if link is not None:
        target = [{"title": "open", "url": link[1]}]
        panel = panel.override_by_name(link[0], [model.DynamicConfigValue(id_val="links", value=target)])
    arranged = {
        "excludeByName": {"Time": True, f"Value #{_letter(0)}": True},
        "indexByName": {name: index for index, name in enumerate(headings)},
        "renameByName": headings,
    }
    return (
        panel.with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(model.DataTransformerConfig(id_val="organize", options=arranged))
        .filterable(True)
    )


def _cells(unit: str) -> list[model.DynamicConfigValue]:
    cells = [model.DynamicConfigValue(id_val="unit", value=unit)]
    if unit == "percentunit":
        gauge = {"type": "gauge", "mode": "basic"}
        for name, value in (("custom.cellOptions", gauge), ("min", 0), ("max", 1), ("decimals", 1)):
            cells.append(model.DynamicConfigValue(id_val=name, value=value))
    return cells


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _coloured(panel: Any, colours: Colours | None) -> Any:
    """Give every state its colour, the same on all dashboards."""
    for name, colour in (colours or {}).items():
        fixed = {"mode": "fixed", "fixedColor": colour}
        panel = panel.override_by_name(name, [model.DynamicConfigValue(id_val="color", value=fixed)])
    return panel
