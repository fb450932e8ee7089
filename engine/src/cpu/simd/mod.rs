//! Vectors of f32 behind one trait, and the run-time choice of instruction set.
//!
//! A kernel is written once, generic over [`Simd`], and instantiated per instruction set by [`Isa::run`], which enters
//! it through a `#[target_feature]` function. Every function here is `#[inline(always)]` so that the vector code lands
//! inside that function.
//!
//! Sums of a vector's lanes always pair lanes in the same order (i with i + LANES/2, then LANES/4, …), so that a dot
//! product has the same bits however many rows are computed beside it.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use portable::Portable;

/// One vector of f32 lanes.
///
/// # Safety
/// Every method may use the instructions of its instruction set: callers must run inside a function entered through
/// [`Isa::run`]. Loads and stores touch `LANES` elements at the pointer, at any alignment.
pub(crate) trait Simd: Copy + 'static {
    /// The vector type.
    type F: Copy;
    /// Lanes per vector; divides 16.
    const LANES: usize;
    /// Rows per tile of the linear kernel for few rows, at most 12: sums of two outputs and more share the register file with inputs or
    /// weights.
    const TILE_TOKENS: usize;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn load_f16(p: *const u16) -> Self::F;
    unsafe fn store_bf16(p: *mut u16, v: Self::F);
    unsafe fn store_f16(p: *mut u16, v: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Nearest integer, ties to even, as f32.
    unsafe fn round(a: Self::F) -> Self::F;
    /// 2^n for integral n in [-126, 127].
    unsafe fn pow2(n: Self::F) -> Self::F;
    unsafe fn reduce_add(v: Self::F) -> f32;
    unsafe fn reduce_max(v: Self::F) -> f32;
    /// Lane sums of 16 vectors into 16 floats, each with the bits of [`Simd::reduce_add`].
    unsafe fn reduce_add16(v: &[Self::F; 16], out: *mut f32);
    /// Asks the cache for the line at `p`; any address will do.
    unsafe fn prefetch(p: *const u8);

    /// e^x, relative error below 2e-7 on [-87, 88]; below that range it falls to 0, at 0 it is exactly 1.
    ///
    /// Range reduction by ln 2 in two parts and a polynomial of degree 6 (Cephes' expf coefficients).
    #[inline(always)]
    unsafe fn exp(x: Self::F) -> Self::F {
        // SAFETY: pure arithmetic on vectors, inside the caller's instruction set.
        unsafe {
            let floor = Self::splat(-87.336_54);
            let x = Self::min(x, Self::splat(88.0));
            let clamped = Self::max(x, floor);
            let n = Self::round(Self::mul(clamped, Self::splat(std::f32::consts::LOG2_E)));
            let r = Self::fma(n, Self::splat(-0.693_359_4), clamped);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_1e-4);
            p = Self::fma(p, r, Self::splat(1.398_199_9e-3));
            p = Self::fma(p, r, Self::splat(8.333_452e-3));
            p = Self::fma(p, r, Self::splat(4.166_579_6e-2));
            p = Self::fma(p, r, Self::splat(1.666_666_5e-1));
            p = Self::fma(p, r, Self::splat(0.5));
            let y = Self::fma(Self::mul(r, r), p, Self::add(r, Self::splat(1.0)));
            let scaled = Self::mul(y, Self::pow2(n));
            // Below the floor the true value is under the smallest normal number: make it 0, so that masked scores
            // (minus infinity) weigh exactly nothing.
            Self::select_less(x, floor, Self::splat(0.0), scaled)
        }
    }
    /// Per lane: `yes` where a < b, else `no`.
    unsafe fn select_less(a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
}

/// A number type that weights or KV entries are stored in.
///
/// # Safety
/// As [`Simd`]: `load` and `store` touch `LANES` elements.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    unsafe fn load<S: Simd>(p: *const Self) -> S::F;
    unsafe fn store<S: Simd>(p: *mut Self, v: S::F);
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: the caller's contract is the callee's.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::F) {
        // SAFETY: the caller's contract is the callee's.
        unsafe { S::store(p, v) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for half::bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: bf16 is a transparent u16; the caller's contract is the callee's.
        unsafe { S::load_bf16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::F) {
        // SAFETY: bf16 is a transparent u16; the caller's contract is the callee's.
        unsafe { S::store_bf16(p.cast(), v) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

impl Element for half::f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::F {
        // SAFETY: f16 is a transparent u16; the caller's contract is the callee's.
        unsafe { S::load_f16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::F) {
        // SAFETY: f16 is a transparent u16; the caller's contract is the callee's.
        unsafe { S::store_f16(p.cast(), v) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

/// A piece of vector code, run by [`Isa::run`] with the best vectors of this machine.
pub(crate) trait Kernel {
    /// The kernel's body.
    ///
    /// # Safety
    /// Must be entered through [`Isa::run`]; mark the implementation `#[inline(always)]`.
    unsafe fn run<S: Simd>(self);
}

/// The instruction sets a kernel can be instantiated for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// AVX-512 F, BW, DQ, VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2, FMA, F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Whatever the compiler makes of plain Rust.
    Portable,
}

impl Isa {
    /// Every instruction set this machine runs, best first.
    pub fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                all.push(Self::Avx512);
            }
            if avx2 {
                all.push(Self::Avx2);
            }
        }
        all.push(Self::Portable);
        all
    }

    /// The best instruction set of this machine.
    pub(crate) fn detect() -> Self {
        Self::available()[0]
    }

    /// Runs a kernel with this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self {
            // SAFETY: an `Isa` is only made by `available`, which checked the features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { x86::enter_avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { x86::enter_avx2(kernel) },
            // SAFETY: portable code needs no features.
            Self::Portable => unsafe { kernel.run::<Portable>() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct ExpKernel<'a> {
        x: &'a [f32],
        out: &'a mut [f32],
    }
    impl Kernel for ExpKernel<'_> {
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            for i in (0..self.x.len()).step_by(S::LANES) {
                // SAFETY: lengths are multiples of 16.
                unsafe {
                    S::store(
                        self.out.as_mut_ptr().add(i),
                        S::exp(S::load(self.x.as_ptr().add(i))),
                    )
                };
            }
        }
    }

    #[test]
    fn exp_is_accurate_and_masks_to_zero() {
        let mut x: Vec<f32> = (0..4096)
            .map(|i| -90.0 + i as f32 * (175.0 / 4096.0))
            .collect();
        x[0] = f32::NEG_INFINITY;
        x[1] = 0.0;
        for isa in Isa::available() {
            let mut out = vec![0.0; x.len()];
            isa.run(ExpKernel {
                x: &x,
                out: &mut out,
            });
            assert_eq!(out[0], 0.0);
            assert_eq!(out[1], 1.0);
            for (&x, &y) in x.iter().zip(&out) {
                let want = f64::from(x).exp();
                if x < -87.4 {
                    assert_eq!(y, 0.0, "{isa:?} exp({x})");
                } else if x > -87.3 {
                    assert!(
                        (f64::from(y) / want - 1.0).abs() < 2e-7,
                        "{isa:?} exp({x}) = {y}, not {want}"
                    );
                }
            }
        }
    }

    struct ReduceKernel<'a> {
        x: &'a [f32],
        one: &'a mut [f32; 16],
        sixteen: &'a mut [f32; 16],
    }
    impl Kernel for ReduceKernel<'_> {
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            // SAFETY: x holds 16 vectors of up to 16 lanes.
            unsafe {
                let mut v = [S::splat(0.0); 16];
                for (i, v) in v.iter_mut().enumerate() {
                    *v = S::load(self.x.as_ptr().add(i * 16));
                    self.one[i] = S::reduce_add(*v);
                }
                S::reduce_add16(&v, self.sixteen.as_mut_ptr());
            }
        }
    }

    #[test]
    fn sixteen_sums_have_the_bits_of_single_sums() {
        let x: Vec<f32> = (0..256u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) % 1000) as f32 * 1e-3 - 0.3)
            .collect();
        for isa in Isa::available() {
            let (mut one, mut sixteen) = ([0.0; 16], [0.0; 16]);
            isa.run(ReduceKernel {
                x: &x,
                one: &mut one,
                sixteen: &mut sixteen,
            });
            assert_eq!(one, sixteen, "{isa:?}");
        }
    }
}
