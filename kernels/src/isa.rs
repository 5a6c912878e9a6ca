//! Which instructions the processor has, and which of them to use.

/// The environment variable that forces a lower instruction set than the processor's best: `scalar`, `avx2`, `avx512`,
/// `avx512vnni`.
pub const ISA_VARIABLE: &str = "VERBUND_ISA";

/// An instruction set that kernels exist for, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with `vpdpbusd`.
    Avx512Vnni,
}

impl Isa {
    /// The best instruction set to use here; [`ISA_VARIABLE`] can force a lower one.
    pub fn detect() -> Isa {
        let best = Self::available().last().copied().unwrap_or(Isa::Scalar);
        let Ok(wanted) = std::env::var(ISA_VARIABLE) else {
            return best;
        };
        match Self::from_name(&wanted) {
            Some(isa) if isa <= best => isa,
            Some(isa) => {
                tracing::warn!(
                    wanted = isa.name(),
                    using = best.name(),
                    "this processor lacks the instruction set in {ISA_VARIABLE}"
                );
                best
            }
            None => {
                tracing::warn!(
                    using = best.name(),
                    "{ISA_VARIABLE} must be scalar, avx2, avx512 or avx512vnni, got {wanted:?}"
                );
                best
            }
        }
    }

    /// [`detect`](Isa::detect), asked once a process.
    pub fn detect_once() -> Isa {
        static ISA: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
        *ISA.get_or_init(Isa::detect)
    }

    /// Every instruction set that this processor has, weakest first.
    pub fn available() -> Vec<Isa> {
        let mut all = vec![Isa::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 {
                all.push(Isa::Avx2);
            }
            if avx512 {
                all.push(Isa::Avx512);
            }
            if avx512 && is_x86_feature_detected!("avx512vnni") {
                all.push(Isa::Avx512Vnni);
            }
        }
        all
    }

    /// Its name in [`ISA_VARIABLE`] and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
        }
    }

    fn from_name(name: &str) -> Option<Isa> {
        [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni]
            .into_iter()
            .find(|isa| isa.name().eq_ignore_ascii_case(name.trim()))
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
