//! Plain Rust vectors of eight lanes: every machine runs them, and the compiler vectorises what it can.

use super::Simd;

/// Eight f32 lanes in an array.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

const LANES: usize = 8;
type V = [f32; LANES];

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn halve(mut v: V, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            v[i] = f(v[i], v[i + width]);
        }
        width /= 2;
    }
    v[0]
}

#[inline(always)]
unsafe fn load_u16(p: *const u16) -> [u16; LANES] {
    // SAFETY: the caller passes a pointer to eight elements, at any alignment.
    unsafe { p.cast::<[u16; LANES]>().read_unaligned() }
}

impl Simd for Portable {
    type F = V;
    const LANES: usize = LANES;
    const TILE_TOKENS: usize = 2;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        // SAFETY: the caller passes a pointer to eight elements, at any alignment.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        // SAFETY: the caller passes a pointer to eight elements, at any alignment.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> V {
        // SAFETY: the caller's contract is the callee's.
        unsafe { load_u16(p) }.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> V {
        // SAFETY: the caller's contract is the callee's.
        unsafe { load_u16(p) }.map(|b| half::f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: V) {
        let bits = v.map(|x| half::bf16::from_f32(x).to_bits());
        // SAFETY: the caller passes a pointer to eight elements, at any alignment.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: V) {
        let bits = v.map(|x| half::f16::from_f32(x).to_bits());
        // SAFETY: the caller passes a pointer to eight elements, at any alignment.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        // Not f32::mul_add: without the instruction that is a slow library call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn round(a: V) -> V {
        // Adding 1.5 * 2^23 leaves no bits for a fraction; exact for |a| < 2^22, and exp's argument is far below.
        const MAGIC: f32 = 12_582_912.0;
        a.map(|x| (x + MAGIC) - MAGIC)
    }
    #[inline(always)]
    unsafe fn pow2(n: V) -> V {
        n.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn reduce_add(v: V) -> f32 {
        halve(v, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn reduce_max(v: V) -> f32 {
        halve(v, f32::max)
    }
    #[inline(always)]
    unsafe fn reduce_add16(v: &[V; 16], out: *mut f32) {
        for (i, &v) in v.iter().enumerate() {
            // SAFETY: the caller passes room for 16 floats.
            unsafe { out.add(i).write(Self::reduce_add(v)) };
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
    #[inline(always)]
    unsafe fn select_less(a: V, b: V, yes: V, no: V) -> V {
        std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }
}
