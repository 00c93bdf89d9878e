// Compile CUDA C++ kernels for x86-64 with g++ -include cuda_emulator.h: one fiber per CUDA thread, one block at a time,
// one thread of the operating system. Deterministic; a seed permutes the order of blocks and threads.
//
// Under -fsanitize=address, undefined or thread the sanitizers see CUDA threads as threads: see docs/cuda-emulator.md.
#pragma once
#define BLADE_EMULATOR 1

// NVIDIA's own headers, as for host code: the types, their conversions and host operators.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __shared__ static  // filled with poison before each block; build.py finds these variables in the symbol table
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

#include "emulator/fiber.h"
#include "emulator/schedule.h"
#include "emulator/barrier.h"
#include "emulator/warp.h"
#include "emulator/async_copy.h"
#include "emulator/tensor_core.h"
#include "emulator/atomics.h"
#include "emulator/device_functions.h"
#include "emulator/traps.h"
#include "emulator/launch.h"
