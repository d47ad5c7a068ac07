"""lm-evaluation-harness with a far KV cache: `lm_eval --model farkv --model_args pretrained=...,method=...`.

Importing this package registers the model. Harness versions with plug-in support do so themselves (entry point
`lm_eval.models`); for older ones `python -m farkv.evals.lm_eval` runs the harness's own command line.
"""

from __future__ import annotations

from farkv.evals.lm_eval.model import FarKVLM

__all__ = ["FarKVLM"]
