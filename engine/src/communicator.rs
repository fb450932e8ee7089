//! [`Communicator`]: how the ranks of a split model add up what each of them has of a sum.

use crate::backend::{Backend, Epilogue, Linear};

/// A projection that the residual stream is to be given, or a rank's part of it.
pub(crate) struct Addend<'a, B: Backend> {
    pub(crate) x: &'a B::Buffer,
    pub(crate) projection: &'a Linear<B::Weight>,
    /// [`Epilogue::Add`], or [`Epilogue::Store`] where another rank brings the stream.
    pub(crate) epilogue: Epilogue,
    pub(crate) bulk: bool,
}

impl<B: Backend> Addend<'_, B> {
    /// Puts the product where the stream is, or adds it to that.
    pub(crate) fn give(&self, backend: &B, stream: &mut B::Buffer) {
        backend.linear(self.x, &[self.projection], self.epilogue, self.bulk, stream);
    }
}

/// A norm of the residual stream.
pub(crate) struct Norm<'a, B: Backend> {
    pub(crate) weight: &'a B::Weight,
    pub(crate) eps: f32,
    pub(crate) out: &'a mut B::Buffer,
}

impl<B: Backend> Norm<'_, B> {
    /// Takes it.
    pub(crate) fn of(self, backend: &B, stream: &B::Buffer) {
        backend.rms_norm(stream, self.weight, self.eps, self.out);
    }
}

/// One rank's end of a group. Every rank calls the same operations in the same order; like a backend's they may run behind
/// the caller's back, and a failure is reported by whatever ends the pass.
pub(crate) trait Communicator<B: Backend>: Send {
    /// Replaces `x` by its sum over the ranks, with the same bits on all of them. With `bulk` false an element's sum has one
    /// order, whatever else `x` holds.
    fn sum(&self, x: &mut B::Buffer, bulk: bool);
    /// Gives the stream the sum of all ranks' addends and takes its norm, with the bits that [`add_in_turn`] has.
    fn add(
        &self,
        backend: &B,
        addend: &Addend<'_, B>,
        stream: &mut B::Buffer,
        norm: Option<Norm<'_, B>>,
    ) {
        add_in_turn(self, backend, addend, stream, norm);
    }
    /// Lets the others go, since this rank cannot go on: their sums mean nothing from now on.
    fn leave(&self);
}

/// Product, sum and norm, one after another.
pub(crate) fn add_in_turn<B: Backend>(
    group: &(impl Communicator<B> + ?Sized),
    backend: &B,
    addend: &Addend<'_, B>,
    stream: &mut B::Buffer,
    norm: Option<Norm<'_, B>>,
) {
    addend.give(backend, stream);
    group.sum(stream, addend.bulk);
    if let Some(norm) = norm {
        norm.of(backend, stream);
    }
}
