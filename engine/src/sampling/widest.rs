//! [`widest!`]: plain loops, compiled once more for each instruction set whose vectors take more at a time.

/// The best instruction set of this machine.
#[cfg(target_arch = "x86_64")]
pub(super) static BEST: std::sync::LazyLock<crate::cpu::Isa> =
    std::sync::LazyLock::new(|| crate::cpu::Isa::available()[0]);

/// Declares functions that run a plain one, which is `#[inline(always)]` with all that it calls, as the compiler vectorises it for this
/// machine. It neither fuses nor reorders operations: bits are the plain function's.
macro_rules! widest {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) -> $out:ty = $plain:ident;)*) => {$(
        $(#[$doc])*
        pub(super) fn $name($($arg: $type),*) -> $out {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $type),*) -> $out {
                    $plain($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) -> $out {
                    $plain($($arg),*)
                }
                match *$crate::sampling::widest::BEST {
                    // SAFETY: this machine has the features of its best instruction set, which are these and more.
                    $crate::cpu::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::cpu::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::Isa::Portable => {}
                }
            }
            $plain($($arg),*)
        }
    )*};
}

pub(super) use widest;
