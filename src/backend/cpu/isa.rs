/*! Which instructions the CPU kernels may use, decided once at run time.

The binary is built for the oldest x86-64, so every fast kernel is compiled for its own instruction
set and chosen by an [`Isa`] value. Every kernel fixes the order of its arithmetic, so the choice
changes how long a result takes and never its bits. */

use crate::{Error, Result};

/// The environment variable that overrides the choice.
pub const VARIABLE: &str = "ATOM_ISA";

/// The names that it takes.
const NAMES: [&str; 4] = ["plain", "portable", "avx2", "avx512"];

/// Proof that this processor has AVX2, FMA and F16C: only detection makes one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Avx2(());

/// Proof that this processor has AVX-512 F, BW, VL, DQ and VNNI, and everything of [`Avx2`]: only detection
/// makes one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Avx512(());

/// An instruction set that kernels are compiled for, from the plainest to the widest. A value is proof
/// that the machine has the set, since the sets that not every machine has hold a token of
/// [`Isa::available`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Isa {
    /// Straight loops that read as the definition: the reference for every other kernel.
    Plain,
    /// Blocked kernels without intrinsics, for any processor.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2(Avx2),
    /// x86-64 with AVX-512 F, BW, VL, DQ and VNNI, and everything of [`Isa::Avx2`].
    Avx512(Avx512),
}

impl Isa {
    /// The widest instruction set of this machine, or the one that `ATOM_ISA` names.
    ///
    /// # Errors
    /// A usage error if `ATOM_ISA` names no instruction set, a machine error if this processor
    /// does not have it.
    pub fn detect() -> Result<Self> {
        let wanted = std::env::var_os(VARIABLE).map(|value| value.to_string_lossy().into_owned());
        Self::choose(wanted.as_deref(), &Self::available())
    }

    /// Every instruction set that this machine can run, the plainest first.
    pub fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "nothing to add"))]
        let mut sets = vec![Self::Plain, Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni");
            if avx2 {
                sets.push(Self::Avx2(Avx2(())));
            }
            if avx2 && avx512 {
                sets.push(Self::Avx512(Avx512(())));
            }
        }
        sets
    }

    /// The name that `ATOM_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Portable => "portable",
            Self::Avx2(_) => "avx2",
            Self::Avx512(_) => "avx512",
        }
    }

    /// The wanted set if it is available, the last available one if none is wanted.
    fn choose(wanted: Option<&str>, available: &[Self]) -> Result<Self> {
        let Some(wanted) = wanted.filter(|name| !name.is_empty()) else {
            return Ok(available.last().copied().unwrap_or(Self::Plain));
        };
        if let Some(isa) = available.iter().find(|isa| isa.name() == wanted) {
            return Ok(*isa);
        }
        if NAMES.contains(&wanted) {
            let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
            return Err(Error::machine(format!("this processor has no {wanted} instructions"))
                .hint(format!("set {VARIABLE} to one of {}, or unset it", names.join(", "))));
        }
        Err(Error::usage(format!("{VARIABLE} is `{wanted}`, which is no instruction set"))
            .hint(format!("use one of {}, or leave {VARIABLE} unset", NAMES.join(", "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn the_widest_set_is_chosen_unless_another_is_named() {
        let available = [Isa::Plain, Isa::Portable, Isa::Avx2(Avx2(()))];
        assert_eq!(Isa::choose(None, &available).unwrap(), available[2]);
        assert_eq!(Isa::choose(Some(""), &available).unwrap(), available[2]);
        assert_eq!(Isa::choose(Some("portable"), &available).unwrap(), Isa::Portable);
    }

    #[test]
    fn an_unknown_or_missing_set_is_an_error_that_lists_the_others() {
        let available = [Isa::Plain, Isa::Portable];
        let unknown = Isa::choose(Some("sse9"), &available).unwrap_err();
        assert_eq!(unknown.kind(), Kind::Usage);
        assert!(unknown.hint_text().unwrap().contains("plain, portable, avx2, avx512"));
        let missing = Isa::choose(Some("avx512"), &available).unwrap_err();
        assert_eq!(missing.kind(), Kind::Machine);
        assert!(missing.hint_text().unwrap().contains("plain, portable,"));
    }

    #[test]
    fn plain_and_portable_run_everywhere() {
        assert_eq!(Isa::available()[..2], [Isa::Plain, Isa::Portable]);
    }
}
