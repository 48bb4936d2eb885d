"""Layout of all dashboards: variables, links between them, rows and panel ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from grafana_foundation_sdk.builders import dashboard as builder
from grafana_foundation_sdk.models import dashboard as model

from dashboards.panels import SOURCE

TAG = "pretrain"
Rows = Sequence[tuple[str, Sequence[Any]]]
"""Pairs of heading and panels."""


def a_dashboard(
    title: str, uid: str, description: str, variables: Iterable[Any], rows: Rows, since: str
) -> builder.Dashboard:
    """Build a dashboard from rows of panels."""
    made = (
        builder.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .refresh("30s")
        .time(since, "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            builder.DashboardLink("Pre-training")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(builder.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in variables:
        made = made.with_variable(variable)
    number = 0
    for heading, panels in rows:
        number += 1
        made = made.with_row(builder.Row(heading).id(number))
        for panel in panels:
            number += 1
            made = made.with_panel(panel.id(number))
    return made


def variable(name: str, label: str, values: str, *, all_of_them: bool) -> builder.QueryVariable:
    """Build a variable with the values of a label."""
    made = (
        builder.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(values)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
    )
    if all_of_them:
        everything = model.VariableOption(text="All", value="$__all", selected=True)
        made = made.multi(True).include_all(True).all_value(".*").current(everything)
    return made


def job_variables(*, all_of_them: bool) -> tuple[builder.QueryVariable, ...]:
    """Build the variables for namespace and name of jobs."""
    return (
        variable("namespace", "Namespace", "label_values(pretrain_job_phase, namespace)", all_of_them=all_of_them),
        variable(
            "name", "Job", 'label_values(pretrain_job_phase{namespace=~"$namespace"}, name)', all_of_them=all_of_them
        ),
    )
