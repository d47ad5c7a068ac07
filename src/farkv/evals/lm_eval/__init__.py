"""lm-evaluation-harness with a far KV cache: `lm_eval --model farkv --model_args pretrained=...,method=...`.

Importing this registers the model. A harness that knows plug-ins does so by itself (entry point `lm_eval.models`);
`python -m farkv.evals.lm_eval` is the harness's own command line for those that do not.
"""

from __future__ import annotations

from farkv.evals.lm_eval.model import FarKVLM

__all__ = ["FarKVLM"]
