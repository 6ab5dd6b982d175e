"""Search clips of one modality with a clip of another: `python examples/search.py RUN --from audio --to video`."""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

import unicode_fast as uf
from unicode_fast.data import open_dataset
from unicode_fast.tasks import encode_split

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", help="a folder that unicode_fast.train has written")
parser.add_argument("--from", dest="source", default="audio", help="modality of the queries")
parser.add_argument("--to", dest="target", default="video", help="modality of the clips that are searched")
parser.add_argument("--clips", type=int, default=1000, help="of the test split, at most")
parser.add_argument("--first", type=int, default=10, help="clips that a search returns")
arguments = parser.parse_args()

model = uf.load(arguments.run)
if not {arguments.source, arguments.target} <= set(model.names):
    parser.error(f"--from and --to must be among {', '.join(model.names)}, got {arguments.source}, {arguments.target}")
test = open_dataset(model.config.data).split("test")
clips = test.select(range(min(arguments.clips, len(test))))


def embed(name: str) -> Tensor:
    """One row a clip, (clips, M): how often it uses each codeword. Rows of all modalities are comparable."""
    codes = encode_split(model, clips, name)
    uses = one_hot(codes.index, model.codewords) * codes.mask.unsqueeze(-1)  # (clips, T, M)
    return normalize(uses.sum(1).float(), dim=-1)


found = (embed(arguments.source) @ embed(arguments.target).T).topk(min(arguments.first, len(clips))).indices

target = torch.as_tensor(clips.target)
same = (target[found] == target[:, None]).float().mean()
chance = (target[None] == target[:, None]).float().mean()
print(f"clip {clips.id[0]}: the first by {arguments.target} are {', '.join(str(clips.id[one]) for one in found[0])}")
print(f"of the first {found.shape[1]}, {100 * same:.0f} % have the query's class; by chance {100 * chance:.0f} %")
