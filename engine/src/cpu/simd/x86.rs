//! AVX-512 and AVX2 vectors.

use std::arch::x86_64::*;

use super::{Kernel, Simd};

/// Sixteen lanes: AVX-512 F, BW, DQ, VL.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512;

/// Eight lanes: AVX2, FMA, F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2;

/// Runs a kernel compiled for AVX-512.
///
/// # Safety
/// The machine must have the features named here.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn enter_avx512<K: Kernel>(kernel: K) {
    // SAFETY: entered with the features of `Avx512`.
    unsafe { kernel.run::<Avx512>() }
}

/// Runs a kernel compiled for AVX2.
///
/// # Safety
/// The machine must have the features named here.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn enter_avx2<K: Kernel>(kernel: K) {
    // SAFETY: entered with the features of `Avx2`.
    unsafe { kernel.run::<Avx2>() }
}

/// The methods that are one intrinsic each. Their contract is the trait's: run only where the features are.
macro_rules! intrinsics {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $ty),*) -> $ret {
            // SAFETY: the caller runs inside the instruction set and passes pointers to LANES elements.
            unsafe { $body }
        }
    )*};
}

/// Sums (or maxima) of eight lanes, pairing i with i + 4, + 2, + 1.
macro_rules! fold256 {
    ($v:expr, $op128:ident, $op_ss:ident) => {{
        let v = $v;
        let q = $op128(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let d = $op128(q, _mm_movehl_ps(q, q));
        _mm_cvtss_f32($op_ss(d, _mm_shuffle_ps::<0b01>(d, d)))
    }};
}

impl Simd for Avx512 {
    type F = __m512;
    const LANES: usize = 16;
    const TILE_TOKENS: usize = 12;

    intrinsics! {
        splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
        load_bf16(p: *const u16) -> __m512 =
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))));
        load_f16(p: *const u16) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        round(a: __m512) -> __m512 = _mm512_roundscale_ps::<0>(a);
        pow2(n: __m512) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
            _mm512_cvtps_epi32(n),
            _mm512_set1_epi32(127),
        )));
        select_less(a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 =
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes);
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        // SAFETY: the caller passes room for 16 floats.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: __m512) {
        // SAFETY: the caller passes room for 16 elements.
        unsafe {
            // Round to nearest, ties to even: add half of the last kept bit, less when that bit is even.
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            _mm256_storeu_si256(
                p.cast(),
                _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)),
            );
        }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m512) {
        // SAFETY: the caller passes room for 16 elements.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<0>(v)) }
    }
    #[inline(always)]
    unsafe fn reduce_add(v: __m512) -> f32 {
        // SAFETY: the caller runs inside the instruction set.
        unsafe {
            let h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            fold256!(h, _mm_add_ps, _mm_add_ss)
        }
    }
    #[inline(always)]
    unsafe fn reduce_max(v: __m512) -> f32 {
        // SAFETY: the caller runs inside the instruction set.
        unsafe {
            let h = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            fold256!(h, _mm_max_ps, _mm_max_ss)
        }
    }
    #[inline(always)]
    unsafe fn reduce_add16(v: &[__m512; 16], out: *mut f32) {
        // SAFETY: the caller runs inside the instruction set and passes room for 16 floats.
        unsafe {
            // Each stage adds the halves (then quarters, …) of two vectors at once, so 16 vectors end as one. After
            // stage 1 a register holds two of them, after stage 2 four, in an order that the last permutation undoes.
            macro_rules! halves {
                ($a:expr, $b:expr) => {
                    _mm512_add_ps(
                        _mm512_shuffle_f32x4::<0b01_00_01_00>($a, $b),
                        _mm512_shuffle_f32x4::<0b11_10_11_10>($a, $b),
                    )
                };
            }
            macro_rules! quarters {
                ($a:expr, $b:expr) => {
                    _mm512_add_ps(
                        _mm512_shuffle_f32x4::<0b10_00_10_00>($a, $b),
                        _mm512_shuffle_f32x4::<0b11_01_11_01>($a, $b),
                    )
                };
            }
            macro_rules! pairs {
                ($a:expr, $b:expr) => {
                    _mm512_add_ps(
                        _mm512_shuffle_ps::<0b01_00_01_00>($a, $b),
                        _mm512_shuffle_ps::<0b11_10_11_10>($a, $b),
                    )
                };
            }
            macro_rules! singles {
                ($a:expr, $b:expr) => {
                    _mm512_add_ps(
                        _mm512_shuffle_ps::<0b10_00_10_00>($a, $b),
                        _mm512_shuffle_ps::<0b11_01_11_01>($a, $b),
                    )
                };
            }
            let h0 = halves!(v[0], v[1]);
            let h1 = halves!(v[2], v[3]);
            let h2 = halves!(v[4], v[5]);
            let h3 = halves!(v[6], v[7]);
            let h4 = halves!(v[8], v[9]);
            let h5 = halves!(v[10], v[11]);
            let h6 = halves!(v[12], v[13]);
            let h7 = halves!(v[14], v[15]);
            // Quarter q of q0 now belongs to vector q, of q1 to 4 + q, and so on.
            let q0 = quarters!(h0, h1);
            let q1 = quarters!(h2, h3);
            let q2 = quarters!(h4, h5);
            let q3 = quarters!(h6, h7);
            let p0 = pairs!(q0, q1);
            let p1 = pairs!(q2, q3);
            let s = singles!(p0, p1);
            // Lane 4q + j of s is the sum of vector 4j + q.
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm512_storeu_ps(out, _mm512_permutexvar_ps(order, s));
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

impl Simd for Avx2 {
    type F = __m256;
    const LANES: usize = 8;
    const TILE_TOKENS: usize = 2;

    intrinsics! {
        splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        load(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
        load_bf16(p: *const u16) -> __m256 =
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))));
        load_f16(p: *const u16) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
        add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        round(a: __m256) -> __m256 = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        pow2(n: __m256) -> __m256 = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
            _mm256_cvtps_epi32(n),
            _mm256_set1_epi32(127),
        )));
        reduce_add(v: __m256) -> f32 = fold256!(v, _mm_add_ps, _mm_add_ss);
        reduce_max(v: __m256) -> f32 = fold256!(v, _mm_max_ps, _mm_max_ss);
        select_less(a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 =
            _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b));
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        // SAFETY: the caller passes room for 8 floats.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: __m256) {
        // SAFETY: the caller passes room for 8 elements.
        unsafe {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let high = _mm256_srli_epi32::<16>(rounded);
            let packed = _mm256_packus_epi32(high, high);
            let joined = _mm256_permute4x64_epi64::<0b00_00_10_00>(packed);
            _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(joined));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m256) {
        // SAFETY: the caller passes room for 8 elements.
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<0>(v)) }
    }
    #[inline(always)]
    unsafe fn reduce_add16(v: &[__m256; 16], out: *mut f32) {
        for (i, &v) in v.iter().enumerate() {
            // SAFETY: the caller passes room for 16 floats.
            unsafe { out.add(i).write(Self::reduce_add(v)) };
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}
