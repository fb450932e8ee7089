//! [`Recorder`]: the launches of a device, written down during a pass and replayed as a CUDA graph where they are those of a pass before.
//!
//! A graph starts several hundred kernels at the price of a few launches, and its kernels overlap as launched ones do: the driver turns
//! the launches' attribute into programmatic edges. While a list may still become one that has a graph, nothing is launched. When it
//! has become one, the graph is; when it can no longer, what was held back is launched and the rest follows as it comes, so that a new
//! list loses next to nothing. A list that came before is captured behind its launches, while the device works.
//!
//! To write a pass down takes a few hundred microseconds, in which the device would have nothing to do. So a pass is several lists, the
//! first a short one: each is on its way while the next is written down.
//!
//! One thread records at a time, the one whose turn it is. What others launch meanwhile (a model being loaded) goes straight to the
//! stream. Graphs are captured on a stream of their own, where nobody else's work can get between.

use std::sync::Arc;
use std::thread::ThreadId;

use cudarc::driver::{CudaContext, CudaGraph, CudaStream, DriverError, result, sys};

use super::graph_cache::{GraphCache, GraphCounts};
use super::recording::{Arguments, LaunchShape, Recording};

/// Launches that make a graph worth its start.
const FEWEST: usize = 8;
/// Launches of a pass's first lists; the last one has the rest. Kernels take the device some five times as long as it takes the host to
/// write them down and launch their graph, but between two graphs kernels do not overlap.
const LISTS: [usize; 3] = [FEWEST, 32, 128];

/// Launches on a stream, singly or as graphs.
pub(super) struct Recorder {
    stream: Arc<CudaStream>,
    /// For captures only: nothing ever runs on it.
    capture_stream: Arc<CudaStream>,
    /// Whether a kernel may start while the one before it ends: see prelude.cuh.
    overlaps: bool,
    /// Whether graphs are wanted, and possible.
    enabled: bool,
    /// The thread whose pass is being written down.
    thread: Option<ThreadId>,
    recording: Recording,
    /// How many of its launches were launched.
    issued: usize,
    /// The list's number in the pass.
    list: usize,
    /// A launch that is not of a pass.
    aside: Recording,
    cache: GraphCache<CudaGraph>,
}

impl Recorder {
    /// Launches on `stream`, whose context is `context`.
    ///
    /// # Errors
    /// The driver's, when there is no second stream.
    pub(super) fn new(
        context: &Arc<CudaContext>,
        stream: &Arc<CudaStream>,
        overlaps: bool,
    ) -> Result<Self, DriverError> {
        Ok(Self {
            stream: Arc::clone(stream),
            capture_stream: context.new_stream()?,
            overlaps,
            enabled: true,
            thread: None,
            recording: Recording::default(),
            issued: 0,
            list: 0,
            aside: Recording::default(),
            cache: GraphCache::new(),
        })
    }

    /// Makes graphs from the next pass on, or none.
    pub(super) fn enable(&mut self, enabled: bool) {
        self.enabled = enabled;
        if !enabled {
            self.cache.clear();
        }
    }

    /// What has become of passes.
    pub(super) fn counts(&self) -> GraphCounts {
        self.cache.counts()
    }

    /// Writes down what this thread launches, until [`Recorder::interrupt`] or [`Recorder::end`].
    pub(super) fn begin(&mut self) {
        if self.enabled {
            self.list = 0;
            self.restart();
            self.thread = Some(std::thread::current().id());
        }
    }

    fn restart(&mut self) {
        self.recording.clear();
        self.issued = 0;
        self.cache.begin();
    }

    fn is_recording(&self) -> bool {
        let current = || std::thread::current().id();
        self.thread.is_some_and(|thread| thread == current())
    }

    /// Launches a kernel, now or with the pass it belongs to.
    ///
    /// # Errors
    /// The driver's, of what is launched now.
    ///
    /// # Safety
    /// The function is live as long as the recorder. `push` adds the kernel's arguments, and every address in them is device memory of
    /// the size that the kernel touches, until the pass is [flushed](Self::flush) or [interrupted](Self::interrupt).
    pub(super) unsafe fn launch(
        &mut self,
        function: sys::CUfunction,
        shape: LaunchShape,
        push: impl FnOnce(&mut Arguments<'_>),
    ) -> Result<(), DriverError> {
        if !self.is_recording() {
            self.aside.clear();
            self.aside.write(function, shape, push);
            self.stream.context().bind_to_thread()?;
            // SAFETY: the caller's promise.
            return unsafe { self.aside.issue(0, self.stream.cu_stream(), self.overlaps) };
        }
        if LISTS.get(self.list) == Some(&self.recording.len()) {
            self.list += 1;
            let result = self.settle();
            self.restart();
            result?;
        }
        self.recording.write(function, shape, push);
        if self.cache.follow(&self.recording) {
            return Ok(());
        }
        self.issue_rest()
    }

    /// Launches what was held back.
    fn issue_rest(&mut self) -> Result<(), DriverError> {
        let first = std::mem::replace(&mut self.issued, self.recording.len());
        if first == self.issued {
            return Ok(());
        }
        self.stream.context().bind_to_thread()?;
        // SAFETY: `launch` was promised as much of each; memory interrupts the recorder before it is given back.
        unsafe {
            self.recording
                .issue(first, self.stream.cu_stream(), self.overlaps)
        }
    }

    /// What was launched so far is on its way when this returns; the pass goes on. Its launches so far make a list of their own.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn flush(&mut self) -> Result<(), DriverError> {
        if !self.is_recording() || self.recording.len() == 0 {
            return Ok(());
        }
        let result = self.settle();
        self.restart();
        result
    }

    fn settle(&mut self) -> Result<(), DriverError> {
        if let Some(graph) = self.cache.graph(&self.recording) {
            self.stream.context().bind_to_thread()?;
            // SAFETY: both handles are live. The graph's launches are, word for word, those of the recording, and what was
            // promised of these holds.
            let launched =
                unsafe { result::graph::launch(graph.cu_graph_exec(), self.stream.cu_stream()) };
            match launched {
                Ok(()) => return Ok(()),
                Err(error) => self.give_up(error),
            }
        }
        self.issue_rest()?;
        if !self.enabled
            || self.recording.len() < FEWEST
            || !self.cache.remember(&mut self.recording)
        {
            return Ok(());
        }
        match self.capture() {
            Ok(graph) => self.cache.keep(graph),
            Err(error) => self.give_up(error),
        }
        Ok(())
    }

    /// A graph of the recording's launches.
    fn capture(&self) -> Result<CudaGraph, DriverError> {
        let stream = &self.capture_stream;
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        // SAFETY: as in `issue_rest`; the stream only takes down what it is given.
        let issued = unsafe { self.recording.issue(0, stream.cu_stream(), self.overlaps) };
        // Ended in any case: a stream left capturing would be of no use again.
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        issued?;
        graph?.ok_or(DriverError(
            sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
        ))
    }

    /// Goes on without graphs. A failure of the device itself shows in the launches that follow.
    fn give_up(&mut self, error: DriverError) {
        tracing::warn!(
            ?error,
            "no CUDA graphs from here on: kernels are launched singly"
        );
        self.enable(false);
    }

    /// Launches what was held back and writes no more of this pass: something that is no launch comes between, or memory moves.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn interrupt(&mut self) -> Result<(), DriverError> {
        if !self.is_recording() {
            return Ok(());
        }
        let result = self.issue_rest();
        self.end();
        result
    }

    /// The pass is over. What was held back is not launched: a pass that ends well has been flushed.
    pub(super) fn end(&mut self) {
        self.recording.clear();
        self.issued = 0;
        self.thread = None;
    }
}
