//! [`Communicator`]: how the ranks of a split model add up what each of them has of a sum.

/// One rank's end of a group. Every rank calls the same operations in the same order; like a backend's they may run behind
/// the caller's back, and a failure is reported by whatever ends the pass.
pub(crate) trait Communicator<Buffer>: Send {
    /// Replaces `x` by its sum over the ranks, with the same bits on all of them. With `bulk` false an element's sum has one
    /// order, whatever else `x` holds.
    fn sum(&self, x: &mut Buffer, bulk: bool);
    /// Lets the others go, since this rank cannot go on: their sums mean nothing from now on.
    fn leave(&self);
}
