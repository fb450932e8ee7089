// What kernels of warpgroup instructions share (Hopper, sm_90a): operands in shared memory that tensor copies (TMA) bring, and the
// instructions' operand lists.
#pragma once

// How a tensor copy finds an array and what it takes of it at a time (cuTensorMapEncodeTiled): boxes of 64 numbers of some rows, 128-byte
// swizzled, zeros past the ends. Mirrors `TensorMap` in tensor_map.rs.
struct alignas(64) TensorMap {
    u64 words[16];
};

// Columns of a box, and its bytes a row.
#define PANEL 64
#define PANEL_ROW 128

__device__ __forceinline__ void copy_tensor(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&map),
                 "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// The same with a say in how long the L2 cache keeps it.
__device__ __forceinline__ void copy_tensor(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(&map),
        "r"(column), "r"(row), "r"(barrier), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void copy_tensor(u32 to, const TensorMap& map, u32 column, u32 middle, u32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                 "l"(&map), "r"(column), "r"(middle), "r"(row), "r"(barrier)
                 : "memory");
}

// Barriers of shared memory that count arrivals and bytes copied.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers known to tensor copies; the block's threads meet after it.
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the barrier's phase of this parity is over.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}

// How wgmma finds an operand of 128-byte swizzled panels: its address; 1,024 bytes from eight rows to the next; where rows are what is summed
// over, the bytes from a panel to the next, too.
__device__ __forceinline__ u64 matrix_at(u32 address, u32 panel_bytes = 16) {
    return u64(address >> 4) | u64(panel_bytes >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// Before instructions: registers written so far are theirs to read. What they compute is read only after `wgmma_wait` and `hold`.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most N groups of instructions are still under way.
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Keeps the compiler from moving what makes or uses these registers across here, which it would not know to be wrong.
template <int N> __device__ __forceinline__ void hold(float (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int N> __device__ __forceinline__ void hold(u32 (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Registers per thread of a warpgroup, whatever the kernel began with: a multiple of 8.
template <int N> __device__ __forceinline__ void give_up_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

template <int N> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_20 NAMES_16 ", %16, %17, %18, %19"
#define NAMES_24 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_32 NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_40 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_48 NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128 NAMES_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define VALUES_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VALUES_8(i) VALUES_4(i), VALUES_4(i + 4)
#define VALUES_16(i) VALUES_8(i), VALUES_8(i + 8)
#define VALUES_20(i) VALUES_16(i), VALUES_4(i + 16)
#define VALUES_24(i) VALUES_16(i), VALUES_8(i + 16)
#define VALUES_32(i) VALUES_16(i), VALUES_16(i + 16)
#define VALUES_40(i) VALUES_32(i), VALUES_8(i + 32)
#define VALUES_48(i) VALUES_32(i), VALUES_16(i + 32)
#define VALUES_64(i) VALUES_32(i), VALUES_32(i + 32)
#define VALUES_128(i) VALUES_64(i), VALUES_64(i + 64)
#if HALF_IS_F16
#define HALF_NAME "f16"
#else
#define HALF_NAME "bf16"
#endif
// d[64][columns] of a warpgroup = a · b, 16 products a number, + d * `keep`; both operands lie in shared memory, 16 numbers of what is summed
// over in a row. `operands` are a's and b's numbers in the list of names. A lane's sums are those that mma.sync would give it, eight columns
// after eight.
#define WGMMA(columns, names, values, operands, keep, a, b) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." HALF_NAME "." HALF_NAME " {" names "}, " operands ", " keep ", 1, 1, 0, 0;" \
                 : values \
                 : "l"(a), "l"(b))
// d += a · b, of which `a` lies in registers, as mma.sync has it, and b's rows are what is summed over.
#define WGMMA_REGISTERS(columns, names, values, operands, a, b) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." HALF_NAME "." HALF_NAME " {" names "}, " operands ", 1, 1, 1, 1;" \
                 : values \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
