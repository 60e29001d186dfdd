"""The JSON schema of the configuration file."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from kvtier.config.model import Config


class _FileSchema(GenerateJsonSchema):
    """The schema of what may stand in the file: a key without a value is not a way to leave it out."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        inner = super().default_schema(schema)
        if inner.get("default", 0) is None:
            del inner["default"]
        return inner


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of the configuration file, before `${NAME}` is expanded."""
    schema = Config.model_json_schema(schema_generator=_FileSchema)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "kvtier configuration"}
