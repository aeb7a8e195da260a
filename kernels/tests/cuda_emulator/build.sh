#!/bin/sh
# Builds the CUDA emulator into the directory $1 and prints the environment that selects it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/include"
out=$(cd "$1" && pwd)
cxx=${TERRARIUM_EMULATOR_CXX:-g++}
# Contracted multiply-add, as NVRTC does it; CubeCL reinterprets memory freely.
flags="-std=c++20 -fPIC -w -fpermissive -march=x86-64-v3 -ffp-contract=fast -fno-strict-aliasing -fwrapv -fno-gnu-unique -fvisibility=hidden -g0 -pipe"

$cxx -std=c++20 -O3 -march=x86-64-v3 -fPIC -shared -pthread -Wall -Wextra -fvisibility=hidden "$here/driver.cpp" -o "$out/libcuda.so" -ldl
$cxx -std=c++20 -O2 -fPIC -shared -Wall -Wextra -fvisibility=hidden "-DEMULATOR_FLAGS=\"$flags\"" "$here/nvrtc.cpp" -o "$out/libnvrtc.so" -ldl
$cxx -std=c++20 -O3 -march=x86-64-v3 -fPIC -shared -Wall -Wextra -fvisibility=hidden "$here/cublaslt.cpp" -o "$out/libcublasLt.so" -ldl
$cxx -std=c++20 -O3 -march=x86-64-v3 -fPIC -shared -pthread -Wall -Wextra -fvisibility=hidden "$here/nccl.cpp" -o "$out/libnccl.so"
$cxx -std=c++20 -O1 -Wall -Wextra "$here/selftest.cpp" -o "$out/selftest" -ldl
for level in 0 1 2; do
    mkdir -p "$out/O$level"
    cp "$here/device.h" "$here/runtime.h" "$out/O$level/"
    $cxx $flags -O$level -x c++-header "$out/O$level/device.h" -o "$out/O$level/device.h.gch"
done
cat "$here/device.h" "$here/runtime.h" "$here/nvrtc.cpp" | cksum > "$out/stamp"

cat > "$out/env.sh" <<END
export LD_LIBRARY_PATH="$out\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
export CUDA_PATH="$out"
END
cat "$out/env.sh"
