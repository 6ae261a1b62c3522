"""The HTTP face of an engine: OpenAI's endpoints, workflows, sessions and metrics. Needs the extra `serve`."""

if not __name__.startswith("tenure."):
    raise ImportError(f"import 'tenure.serving.server', not {__name__!r}: a second name would give duplicate classes")

try:
    import fastapi as _fastapi
    import prometheus_client as _prometheus_client
    import uvicorn as _uvicorn
except ImportError as error:
    raise ImportError(f"serving over HTTP needs {error.name}: pip install 'tenure[serve]'") from None

from ..sampling.grammar_compiler import GrammarCompiler
from ..sampling.grammar_config import GrammarConfig
from .api_keys import ApiKeys, Caller
from .app import Backend, build_app
from .http_server import bind, run_server
from .prompts import PromptRenderer
from .quotas import ClientLimits
from .server_config import ServerConfig

del _fastapi, _prometheus_client, _uvicorn

__all__ = [
    "ApiKeys", "Backend", "Caller", "ClientLimits", "GrammarCompiler", "GrammarConfig", "PromptRenderer",
    "ServerConfig", "bind", "build_app", "run_server",
]  # fmt: skip
