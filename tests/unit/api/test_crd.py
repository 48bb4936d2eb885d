"""The CustomResourceDefinition follows the models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.worlds.bad_jobs import BAD_JOBS
from tools.crd import field_tables as fields
from tools.crd.__main__ import MADE, drift
from tools.crd.cel_rules import ROOT_RULES, RULES
from tools.crd.definition import custom_resource_definition

ROOT = Path(__file__).parents[3]


def schemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for child in (*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")):
        if isinstance(child, dict):
            yield from schemas(child)


def the_schema() -> dict[str, Any]:
    return custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def test_the_file_is_what_the_models_say() -> None:
    assert drift(ROOT) == "", "run `python -m tools.crd`"


def test_a_changed_file_is_told_with_the_difference(tmp_path: Path) -> None:
    for path in MADE:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text().replace("default: bf16", "default: fp32"))

    changes = [
        line[:1] + line[1:].strip() for line in drift(tmp_path).splitlines() if line[0] in "+-" and line[1] == " "
    ]
    assert changes == 2 * ["-default: fp32", "+default: bf16"]


def test_every_field_of_the_spec_stands_in_the_table_of_its_object() -> None:
    sections = {part.splitlines()[0].strip("`"): part for part in fields.text().split("\n## ")[1:]}

    def check(path: str, schema: dict[str, Any]) -> int:
        properties = schema["properties"]
        inner = {name: field.get("items", field) for name, field in properties.items()}
        below = {f"{path}.{name}{'[]' * ('items' in properties[name])}": field for name, field in inner.items()}
        assert all(f"\n| `{name}`" in sections[path] for name in properties)
        return 1 + sum(check(name, field) for name, field in below.items() if "properties" in field)

    assert check("spec", the_schema()["properties"]["spec"]) == len(sections)


def test_the_schema_is_structural() -> None:
    for schema in schemas(the_schema()):
        assert "$ref" not in schema
        assert "type" in schema or schema.get("x-kubernetes-int-or-string")
        assert schema.get("type") != "array" or "items" in schema
        assert schema.get("type") != "integer" or schema.get("format") == "int64" or "enum" in schema


def test_every_field_that_users_write_is_described() -> None:
    def undescribed(path: str, schema: dict[str, Any]) -> Iterator[str]:
        for name, field in schema.get("properties", {}).items():
            if "description" not in field:
                yield f"{path}.{name}"
            yield from undescribed(f"{path}.{name}", field.get("items", field))

    assert list(undescribed("spec", the_schema()["properties"]["spec"])) == []


def test_every_rule_has_a_job_that_breaks_it() -> None:
    told = [bad.says for bad in BAD_JOBS]
    rules = [rule for group in RULES.values() for rule in group] + list(ROOT_RULES)

    of_one_job = [rule.message for rule in rules if "oldSelf" not in rule.rule]
    assert [message for message in of_one_job if not any(says in message for says in told)] == []


def test_null_is_a_value_only_where_it_differs_from_absence() -> None:
    spec = the_schema()["properties"]["spec"]
    nullable = [name for schema in schemas(spec) for name, field in schema.get("properties", {}).items()
                if field.get("nullable")]  # fmt: skip

    assert nullable == ["clip"]
