//! [`EngineThread`]: the one thread of a worker that runs the model, and how others learn that it ended.

use tokio_util::sync::CancellationToken;

use crate::error::WorkerError;

/// A running engine thread. It ends when its loop returns: when every sender of its inbox is gone.
#[derive(Debug)]
pub struct EngineThread {
    ended: CancellationToken,
}

impl EngineThread {
    /// Starts a thread that runs `engine`.
    ///
    /// # Errors
    /// [`WorkerError::Thread`].
    pub fn start(engine: impl FnOnce() + Send + 'static) -> Result<Self, WorkerError> {
        let ended = CancellationToken::new();
        // Fires on return and on unwinding alike.
        let guard = ended.clone().drop_guard();
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                let _guard = guard;
                engine();
            })
            .map_err(WorkerError::Thread)?;
        Ok(Self { ended })
    }

    /// Completes when the thread has ended, and with it everything its loop owned is dropped.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn return_and_panic_both_end_it() {
        EngineThread::start(|| {}).unwrap().ended().await;
        let dying = EngineThread::start(|| panic!("expected in this test")).unwrap();
        dying.ended().await;
    }
}
