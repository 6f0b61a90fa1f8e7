"""Runs in .venv-kubernetes: Kubernetes objects on stdin (a JSON list), versions as arguments, problems on stdout.

Strict: a field that the schema does not name is a problem. Objects of the Prometheus Operator are compared with the
types that cloudcoil generates from its CustomResourceDefinitions.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jsonschema
import kubernetes_validate
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator


def closed(schema: Any) -> Any:
    """The schema, with every object that names its properties having no others."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if "properties" in made and "additionalProperties" not in made:
        made["additionalProperties"] = False
    return made


def problems(manifest: dict[str, Any], version: str) -> list[str]:
    """What is wrong with one object."""
    if manifest["apiVersion"].startswith("monitoring.coreos.com/"):
        model = getattr(prometheus_operator, manifest["kind"])
        validator = jsonschema.Draft202012Validator(closed(model.model_json_schema(by_alias=True)))
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def main() -> None:
    """Validate each against each."""
    found = [
        f"{version} {manifest['kind']}/{manifest['metadata']['name']}: {problem}"
        for manifest in json.load(sys.stdin)
        for version in sys.argv[1:]
        for problem in problems(manifest, version)
    ]
    sys.stdout.write("\n".join(found))


if __name__ == "__main__":
    main()
