"""The process that has the clients: the API server, or the one of an LLM."""

from fusedstep.vllm_plugin.frontend.explain_route import ExplainRoute

__all__ = ["ExplainRoute"]
