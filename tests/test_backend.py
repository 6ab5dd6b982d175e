"""Choosing, refusing and reporting backends, and the extension that must not be opened."""

import importlib.machinery
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from processes import python

from unicode_fast import backend
from unicode_fast.backend import BackendUnavailable, Extension, available_backends, choose_backend, load_extension

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an extension for CPUs, one operator that uses it, and one operator in Triton."""
    monkeypatch.setattr(backend, "EXTENSION", Extension(module=backend, decision="UNICODE_FAST_CUDA=0"))
    monkeypatch.setattr(backend, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "nearest_codeword", ("cuda", "cpp", "reference"))
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "cross_info_nce", ("triton", "reference"))


class TestChoose:
    @pytest.mark.parametrize("operator", backend.IMPLEMENTATIONS)
    @pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
    def test_the_reference_runs_everywhere(self, operator: str, device: str) -> None:
        assert choose_backend(operator, torch.device(device), "reference") == "reference"
        assert choose_backend(operator, torch.device(device), None) in backend.IMPLEMENTATIONS[operator]

    def test_none_takes_the_fastest_installed_one(self, loaded: None) -> None:
        assert choose_backend("nearest_codeword", CPU, None) == "cpp"
        assert choose_backend("nearest_codeword", CUDA, None) == "reference"
        assert choose_backend("cross_info_nce", CPU, None) == "reference"
        assert choose_backend("cross_info_nce", CUDA, None) == "triton"

    def test_a_name_is_obeyed(self, loaded: None) -> None:
        assert choose_backend("nearest_codeword", CPU, "cpp") == "cpp"
        assert choose_backend("nearest_codeword", CPU, "reference") == "reference"

    @pytest.mark.parametrize(
        ("operator", "device", "name", "message"),
        [
            ("nearest_codeword", CUDA, "cpp", "it runs on cpu tensors, these are on cuda"),
            ("nearest_codeword", CPU, "cuda", "it runs on cuda tensors, these are on cpu"),
            ("nearest_codeword", CUDA, "cuda", r"\(UNICODE_FAST_CUDA=0\); build it .* with: UNICODE_FAST_CUDA=1 .*pip"),
            ("nearest_codeword", CUDA, "cuda", "torch finds no CUDA device here"),
            ("nearest_codeword", CUDA, "triton", "this version has no Triton implementation of nearest_codeword"),
            ("cross_info_nce", CUDA, "triton", "torch finds no CUDA device here"),
            ("cross_info_nce", CPU, "cpp", r"this version has no C\+\+ implementation of cross_info_nce"),
        ],
    )
    def test_reason_refused(self, loaded: None, operator: str, device: torch.device, name: str, message: str) -> None:
        with pytest.raises(BackendUnavailable, match=f"backend '{name}' is not available for {operator}.*{message}"):
            choose_backend(operator, device, name)

    def test_missing_triton_names_its_remedy(self, loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "_TRITON_INSTALLED", False)
        with pytest.raises(BackendUnavailable, match="Triton is not installed; install it with: pip install triton"):
            choose_backend("cross_info_nce", CUDA, "triton")
        assert choose_backend("cross_info_nce", CUDA, None) == "reference"

    def test_unknown_names(self) -> None:
        with pytest.raises(ValueError, match="backend must be None or one of reference, cpp, cuda, triton, got 'fast'"):
            choose_backend("nearest_codeword", CPU, "fast")
        with pytest.raises(ValueError, match="operator must be one of nearest_codeword, .*, got 'nearest'"):
            choose_backend("nearest", CPU, None)

    def test_torch_compile_follows_the_choice(self) -> None:
        def double(x: torch.Tensor) -> torch.Tensor:
            return x * (2 if choose_backend("nearest_codeword", x.device, None) in backend.BACKENDS else 0)

        compiled = torch.compile(double, fullgraph=True, backend="eager")
        assert compiled(torch.ones(2)).tolist() == [2, 2]


class TestReport:
    def test_of_every_operator_and_backend(self, loaded: None) -> None:
        report = available_backends("cpu")
        assert list(report) == list(backend.IMPLEMENTATIONS)
        assert all(list(answers) == list(backend.BACKENDS) for answers in report.values())
        assert report["nearest_codeword"]["cpp"] == "available"
        assert report["cross_info_nce"]["cpp"] == "this version has no C++ implementation of cross_info_nce"
        assert "it runs on cuda tensors, these are on cpu" in report["cross_info_nce"]["triton"]
        assert "torch finds no CUDA device" in available_backends(CUDA)["cross_info_nce"]["triton"]

    @pytest.mark.parametrize("device", [CPU, CUDA])
    def test_agrees_with_the_choice(self, device: torch.device) -> None:
        for operator, answers in available_backends(device).items():
            for name, answer in answers.items():
                if answer == "available":
                    assert choose_backend(operator, device, name) == name
                else:
                    with pytest.raises(BackendUnavailable) as refusal:
                        choose_backend(operator, device, name)
                    assert str(refusal.value).endswith(answer)


class TestExtension:
    """The file is no library: opening it would cause another message."""

    @staticmethod
    def write(folder: Path, record: object) -> Path:
        library = folder / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        library.write_bytes(b"not a library")
        Path(f"{library}.json").write_text(json.dumps(record))
        return library

    def test_of_another_torch_is_not_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.write(tmp_path, {"torch": "2.0.0", "cuda": None})
        extension = load_extension(tmp_path, "2.13.0+cpu")
        assert extension.module is None
        assert extension.problem == "the C++ extension was built with torch 2.0.0, but torch 2.13.0+cpu is imported"
        monkeypatch.setattr(backend, "EXTENSION", extension)
        for name in ("cpp", "cuda"):
            with pytest.raises(BackendUnavailable) as refusal:
                choose_backend("nearest_codeword", torch.device("cpu" if name == "cpp" else "cuda"), name)
            assert extension.problem in str(refusal.value)
            assert str(refusal.value).endswith(f"build it with: {backend.rebuild_command()}")
        assert choose_backend("nearest_codeword", CPU, None) == "reference"

    def test_the_build_of_torch_counts(self, tmp_path: Path) -> None:
        self.write(tmp_path, {"torch": "2.13.0+cu130"})
        assert "2.13.0+cu130, but torch 2.13.0+cpu" in load_extension(tmp_path, "2.13.0+cpu").problem

    def test_that_cannot_be_opened(self, tmp_path: Path) -> None:
        self.write(tmp_path, {"torch": "2.13.0"})
        extension = load_extension(tmp_path, "2.13.0")
        assert extension.module is None
        assert "cannot be loaded" in extension.problem

    @pytest.mark.parametrize("record", [None, [], {}, {"cuda": None}])
    def test_without_a_record_is_not_opened(self, tmp_path: Path, record: object) -> None:
        library = self.write(tmp_path, record)
        if record is None:
            Path(f"{library}.json").unlink()
        extension = load_extension(tmp_path, "2.13.0")
        assert extension.module is None
        assert "has no record of the torch" in extension.problem

    def test_not_installed(self, tmp_path: Path) -> None:
        assert "installed without its C++ extension" in load_extension(tmp_path).problem

    def test_the_one_of_this_installation(self) -> None:
        """A loaded extension was built with the imported torch; without one there is a reason."""
        if backend.EXTENSION.module is None:
            assert backend.EXTENSION.problem
        else:
            recorded = json.loads(Path(f"{backend.EXTENSION.module.__file__}.json").read_text())
            assert recorded["torch"] == torch.__version__
            assert backend.EXTENSION.module is sys.modules["unicode_fast._C"]

    def test_rebuild_command(self) -> None:
        words = shlex.split(backend.rebuild_command())
        assert words[:4] == [sys.executable, "-m", "pip", "install"]
        assert "--no-deps" in words


class TestWish:
    def test_reference_for_everything(self) -> None:
        script = "import unicode_fast, torch; from unicode_fast.backend import choose_backend as choose\n"
        script += "print(choose('nearest_codeword', torch.device('cpu'), None))"
        found = python("-c", script, UNICODE_FAST_BACKEND="reference")
        assert found.stdout.strip() == "reference", found.stderr

    def test_other_values(self) -> None:
        assert backend.forced_backend({}) == ""
        with pytest.raises(ValueError, match="UNICODE_FAST_BACKEND must be reference or empty, got 'cpp'"):
            backend.forced_backend({"UNICODE_FAST_BACKEND": "cpp"})


@pytest.mark.skipif(backend.EXTENSION.module is None, reason="the C++ extension is not there")
@pytest.mark.parametrize("name", ["portable", "avx2", "avx_vnni", "avx512", "avx512_vnni"])
def test_every_instruction_set(name: str) -> None:
    """The operator tests use the best instruction set; here each of the processor's sets keeps the promise."""
    script = """
import os, re, sys, torch
from unicode_fast import cross_info_nce, nearest_codeword
from unicode_fast.backend import EXTENSION
sys.path.insert(0, sys.argv[1])
import tolerances
from cases import NEAREST_CASES, normal
from compare import assert_all_close, assert_nearest
from test_transformer import SIZES, check_draws, check_layer
NAN, INF = float("nan"), float("inf")
try:
    EXTENSION.module.build_info()
except RuntimeError as error:
    named = re.search(r"one that this processor has \\((.*)\\), got none", str(error))[1].split(", ")
os.environ["UNICODE_FAST_CPU"] = sys.argv[2]
try:
    assert EXTENSION.module.build_info()["cpu"] == sys.argv[2]
    assert sys.argv[2] in named
except RuntimeError as error:
    assert sys.argv[2] not in named and "portable" in named
    print("lacking:", error)
    sys.exit()
for name, make in NEAREST_CASES.items():
    features, codebook = make()
    found = nearest_codeword(features, codebook, backend="cpp")
    assert_nearest(*found, features, codebook)
odd = torch.tensor([[NAN, 0], [1, NAN], [INF, 0], [-INF, INF], [5, 0], [4, 0]]).repeat(9, 20)
for codebook in (odd, odd[4:6], odd[:2]):
    for features in (odd, odd.half(), odd.double()):
        found, truth = (nearest_codeword(features, codebook, backend=b) for b in ("cpp", "reference"))
        assert torch.equal(found.index, truth.index)
        assert torch.equal(found.squared_distance.nan_to_num(-1), truth.squared_distance.nan_to_num(-1))
def loss(backend, vectors, softmax_over):
    leaves = [x.clone().requires_grad_() for x in vectors]
    result = cross_info_nce(*leaves, softmax_over=softmax_over, backend=backend)
    return [*result, *torch.autograd.grad(result.loss, leaves)]
for dtype in (torch.float32, torch.float64):
    vectors = [normal(2, 2, 37, 8, seed=seed, dtype=dtype) for seed in (0, 1)]
    odd = vectors[0].clone()
    odd[0, 0, 3], odd[0, 0, 5], odd[1, 0, 0], odd[0, 1, 5, 0] = NAN, INF, -INF, -INF
    for softmax_over in ("predictions", "candidates", "both"):
        found, truth = (loss(b, vectors, softmax_over) for b in ("cpp", "reference"))
        assert_all_close(found, truth, tolerances.cross_info_nce_gradient(20, dtype))
        found, truth = (loss(b, [odd, vectors[1]], softmax_over) for b in ("cpp", "reference"))
        assert torch.equal(found[1].isnan(), truth[1].isnan()) and torch.equal(found[2], truth[2])
        options = {"softmax_over": softmax_over}
        found, truth = (cross_info_nce(odd, vectors[1], backend=b, **options) for b in ("cpp", "reference"))
        assert truth.pair_loss.isinf().any()
        assert_all_close(found, truth, tolerances.cross_info_nce_gradient(20, dtype))
for sizes in SIZES:
    check_layer(*sizes, masked=True, dropout=0.3)
check_draws(0.1)
print("equal")
"""
    found = python("-c", script, Path(__file__).parent, name, UNICODE_FAST_CPU="none")
    assert found.returncode == 0, found.stderr
    if found.stdout.startswith("lacking"):
        pytest.skip(f"this processor has no {name}")
    assert found.stdout.strip() == "equal"
