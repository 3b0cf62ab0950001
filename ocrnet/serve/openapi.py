"""OpenAPI descriptions of request bodies and of responses that are not JSON."""

from typing import Any

ABOUT = (
    "Semantic segmentation with OCRNet. Send an image as the body of a POST, or as the field `image` of a form. The "
    "field `error` of an error response gives the reason. If a token is required, send `Authorization: Bearer TOKEN`."
)
_BYTES = {"type": "string", "format": "binary"}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
_ERRORS = {
    400: "a damaged image, an empty body or an unknown parameter",
    401: "the token is missing or wrong",
    403: "a request from a page of another site, or a Host that is not this server's",
    408: "the body arrived too slowly",
    413: "too many bytes or pixels",
    415: "not a JPEG, PNG, WebP or BMP",
    500: "internal server error; see the server's log",
    503: "the server is busy; retry after the seconds in Retry-After",
    504: "prediction took too long",
}


def _error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"description": _ERRORS[status], "content": {"application/json": {"schema": _ERROR}}}
        for status in statuses
    }


def _flag(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": text, "schema": {"type": "boolean", "default": False}}


def _request(*parameters: dict[str, Any]) -> dict[str, Any]:
    form = {"type": "object", "properties": {"image": _BYTES}, "required": ["image"]}
    kinds = {kind: {"schema": _BYTES} for kind in ("image/jpeg", "image/png", "image/webp", "image/bmp")}
    averaging = (
        _flag("multi_scale", "average over scales 0.5 to 1.75"),
        _flag("flip", "average with the mirrored image"),
    )
    return {
        "parameters": [*parameters, *averaging],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}, **kinds}},
    }


PREDICT = _request(
    {
        "name": "output",
        "in": "query",
        "description": "labels: PNG of class indices; overlay, color: PNG; json: the area of each class. "
        "Default: json if Accept contains application/json and no image type, else labels.",
        "schema": {"type": "string", "enum": ["labels", "overlay", "color", "json"]},
    }
)
EXPLAIN = _request()
METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}, **_error_responses(401)}
MODEL_RESPONSES = _error_responses(401)


def predict_responses() -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of /predict."""
    content = {"image/png": {"schema": _BYTES}, "application/json": {"schema": {"type": "object"}}}
    return {200: {"description": "the prediction", "content": content}, **_error_responses(*_ERRORS)}


def explain_responses() -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of /explain."""
    text = "uint32 (little-endian) length of a JSON text, the text, then the uint8 arrays listed in its `arrays`"
    content = {"application/octet-stream": {"schema": _BYTES}}
    return {200: {"description": text, "content": content}, **_error_responses(*_ERRORS)}
