"""A new method in one file: read the records whose keys have the smallest norm (Devoto et al. 2024).

python examples/new_method.py run --method knorm --file book.txt "Who wrote the letter?"
"""

from dataclasses import dataclass

from farkv.cli import main
from farkv.methods.base import Selector
from farkv.methods.table import METHODS, Row
from farkv.store.near.index import LayerIndex


@dataclass(frozen=True, kw_only=True)
class KNorm:
    fraction: float = 0.1
    sinks: int = 4
    window: int = 16


class KNormSelector(Selector):
    def __init__(self, config, place):
        super().__init__(config, place)
        self.norms = {i: LayerIndex(place.ledger, place.device, place.reserve_tokens) for i in place.layers}
        self.followers = dict(self.norms)  # the store crops, reorders and frees them with the layer's records

    def prepare(self, records, n_rows):  # one number per record, which is scored instead of its key
        for _, keys in records.near_blocks(self.norms[records.layer].length, n_rows):
            self.norms[records.layer].append(keys.norm(dim=-1, keepdim=True))

    def index_bytes(self, shape, tokens):  # counts against the near limit, and in the receipt's index_fraction
        return shape.batch * shape.kv_heads * tokens * shape.itemsize

    def score(self, records, query, n_rows, visible):
        return -self.norms[records.layer].codes()[:, :, :n_rows, 0].float()


METHODS["knorm"] = Row(KNorm, KNormSelector)
if __name__ == "__main__":
    main()
