//! [`Oversight`]: which dense passes look after what masked ones did, and what follows from what they find.

use specattn_engine::EngineError;
use specattn_engine::sampling::{Distribution, kl_divergence};
use specattn_proto::validate::CheckedCheckPolicy;

use crate::controller::Controller;
use crate::leash::Leash;
use crate::run::{Record, Run};

/// How the target attends in a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// To everything.
    Dense,
    /// By masks.
    Sparse,
    /// By masks, then confirmed.
    Exact,
}

/// A session's dense passes beyond those that nothing else would serve.
#[derive(Debug)]
pub(crate) enum Oversight {
    /// None: dense mode, and plain sparse mode.
    None,
    /// Masked passes are provisional.
    Confirm(Controller),
    /// Masked passes commit, and are refreshed and measured.
    Refresh(Leash),
}

impl Oversight {
    /// The oversight of a session; `mask_p` as asked for, which leaves the choice open where absent.
    pub(crate) fn new(mode: Mode, check: &CheckedCheckPolicy, mask_p: Option<f32>) -> Self {
        match mode {
            Mode::Exact => {
                let length = check.confirm_length.map(|n| n as usize);
                Self::Confirm(Controller::new(length, mask_p))
            }
            Mode::Sparse if check.refresh_every.is_some() || check.max_kl.is_some() => {
                Self::Refresh(Leash::new(check.refresh_every, check.max_kl, mask_p))
            }
            Mode::Dense | Mode::Sparse => Self::None,
        }
    }

    /// Whether what masked passes let through is provisional.
    pub(crate) fn is_provisional(&self) -> bool {
        matches!(self, Self::Confirm(_))
    }

    /// Whether a run of `length` tokens is to be checked by the next pass.
    pub(crate) fn is_due(&self, length: usize) -> bool {
        match self {
            Self::None => false,
            Self::Confirm(controller) => controller.is_due(length),
            Self::Refresh(leash) => leash.is_due(length),
        }
    }

    /// The mass that masks are to reach; `None` leaves it at what the session asked for.
    pub(crate) fn mask_p(&self) -> Option<f32> {
        match self {
            Self::None => None,
            Self::Confirm(controller) => Some(controller.mask_p()),
            Self::Refresh(leash) => leash.mask_p(),
        }
    }

    /// The confirm length in force.
    pub(crate) fn confirm_length(&self) -> Option<usize> {
        match self {
            Self::Confirm(controller) => Some(controller.confirm_length()),
            Self::None | Self::Refresh(_) => None,
        }
    }

    /// Whether it looks at logits, not only at what was drawn.
    pub(crate) fn needs_logits(&self) -> bool {
        matches!(self, Self::Refresh(leash) if leash.measures())
    }

    /// What to keep of a token that a masked pass drew from `drawn`, out of `logits`; `None`: nothing checks it.
    pub(crate) fn record(&self, drawn: &Distribution, logits: &[f32]) -> Option<Record> {
        match self {
            Self::None => None,
            Self::Confirm(_) => Some(Record::Drawn(drawn.clone())),
            Self::Refresh(leash) if leash.measures() => Some(Record::Logits(logits.to_vec())),
            Self::Refresh(_) => Some(Record::Nothing),
        }
    }

    /// A masked round that could read `kept` of what a dense one reads; it gave `tokens`, or none when a dense pass took
    /// its place.
    pub(crate) fn round(&mut self, kept: f64, tokens: usize) {
        if let Self::Confirm(controller) = self {
            controller.round(kept, tokens);
        }
    }

    /// A dense pass over `run`: its distributions `p` in exact mode, and its logits, `[rows, vocab_size]`, each from the
    /// run's first token on.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] for logits that mean nothing.
    pub(crate) fn checked(
        &mut self,
        run: &Run,
        p: &[Distribution],
        logits: &[f32],
    ) -> Result<(), EngineError> {
        match self {
            Self::None => {}
            Self::Confirm(controller) => {
                let pairs = run.records().iter().zip(p);
                let overlaps = pairs.filter_map(|(record, p)| match record {
                    Record::Drawn(q) => Some(p.overlap(q)),
                    Record::Nothing | Record::Logits(_) => None,
                });
                controller.confirmed(overlaps);
            }
            Self::Refresh(leash) => {
                for (index, record) in run.records().iter().enumerate() {
                    if let Record::Logits(sparse) = record {
                        let row = &logits[index * sparse.len()..][..sparse.len()];
                        leash.measured(kl_divergence(row, sparse)?);
                    }
                }
                leash.adapt();
            }
        }
        Ok(())
    }

    /// Mean divergence measured and the number of tokens it was measured on.
    pub(crate) fn divergence(&self) -> (f64, u64) {
        match self {
            Self::Refresh(leash) => leash.divergence(),
            Self::None | Self::Confirm(_) => (0.0, 0),
        }
    }

    /// Another draft joined: what was learnt of the last one's masks may not hold.
    pub(crate) fn new_draft(&mut self) {
        if let Self::Confirm(controller) = self {
            controller.forget();
        }
    }
}
