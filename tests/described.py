"""Values held to what `/openapi.json` says of them."""

from __future__ import annotations

from typing import Any

import jsonschema


def check(value: Any, schema: Any, document: Any) -> None:
    """Raise AssertionError for what is not as described, or has fields that are not described."""
    strict = {**_strict(schema), "components": _strict(document["components"])}
    validator = jsonschema.Draft202012Validator(strict)
    problem = jsonschema.exceptions.best_match(validator.iter_errors(value))
    assert problem is None, (value, problem.message)


def _strict(schema: Any) -> Any:
    """Return the same schema without room for fields that it does not name."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and "type" in found:
        found.setdefault("additionalProperties", False)
    return found
