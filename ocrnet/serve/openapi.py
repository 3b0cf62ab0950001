"""OpenAPI descriptions of request bodies and of responses that are not JSON."""

from typing import Any

ABOUT = (
    "Semantic segmentation by OCRNet. Send an image as the body of a POST, or as the field `image` of a form. If a "
    "request is rejected, `error` gives the reason in one sentence. With a token: `Authorization: Bearer TOKEN`."
)
_BYTES = {"type": "string", "format": "binary"}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
_TEXTS = {
    400: "a damaged image, an empty body or an unknown parameter",
    401: "the token is missing or wrong",
    403: "a request from a page of another site, or a Host that is not this server's",
    408: "the body arrived too slowly",
    413: "too many bytes or pixels",
    415: "not a JPEG, PNG, WebP or BMP",
    500: "internal server error; see the server's log",
    503: "the server is busy; Retry-After gives the seconds until the next try",
    504: "prediction took too long",
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"description": _TEXTS[status], "content": {"application/json": {"schema": _ERROR}}}
        for status in statuses
    }


def _flag(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": text, "schema": {"type": "boolean", "default": False}}


def _takes(*parameters: dict[str, Any]) -> dict[str, Any]:
    form = {"type": "object", "properties": {"image": _BYTES}, "required": ["image"]}
    kinds = {kind: {"schema": _BYTES} for kind in ("image/jpeg", "image/png", "image/webp", "image/bmp")}
    how = (
        _flag("multi_scale", "average over scales 0.5 to 1.75"),
        _flag("flip", "average with the mirrored image"),
    )
    return {
        "parameters": [*parameters, *how],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}, **kinds}},
    }


PREDICT = _takes(
    {
        "name": "output",
        "in": "query",
        "description": "labels: PNG of class indices; overlay, color: PNG; json: the area of each class. "
        "Without it, Accept decides between labels and json.",
        "schema": {"type": "string", "enum": ["labels", "overlay", "color", "json"]},
    }
)
EXPLAIN = _takes()
METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}, **_refusals(401)}
REFUSALS_OF_MODEL = _refusals(401)


def predict_answers() -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of /predict."""
    content = {"image/png": {"schema": _BYTES}, "application/json": {"schema": {"type": "object"}}}
    return {200: {"description": "the prediction", "content": content}, **_refusals(*_TEXTS)}


def explain_answers() -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of /explain."""
    text = "uint32 (little-endian) length of a JSON text, the text, then the uint8 arrays listed in its `arrays`"
    content = {"application/octet-stream": {"schema": _BYTES}}
    return {200: {"description": text, "content": content}, **_refusals(*_TEXTS)}
