//! [`Crew`]: the engine's threads, for what the host does between forwards.
//!
//! Sessions of a batch know nothing of each other once its forward is done. What one of them does with its output takes
//! microseconds where tokens alone are looked at, and a large part of a millisecond where masks are coded or a whole vocabulary is
//! sampled from. So the caller begins alone, unless the time before took long, and asks for help once it has been at it for a while.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::cpu::Pool;

/// Work that the caller does alone: some ten times what it costs to wake the others.
const ALONE: Duration = Duration::from_micros(100);

/// The caller's thread and those of the pool that all models of the process share; for one kind of work.
#[derive(Clone, Default)]
pub struct Crew {
    pool: Option<Arc<Pool>>,
    /// What an item took the last time.
    usual: Duration,
}

impl std::fmt::Debug for Crew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let threads = self.pool.as_ref().map_or(1, |pool| pool.threads());
        f.debug_struct("Crew").field("threads", &threads).finish()
    }
}

impl Crew {
    /// The threads of models with this [`crate::LoadOptions::threads`]; they are started by whoever asks first.
    pub fn new(threads: usize) -> Self {
        let pool = Pool::shared(threads);
        Self {
            pool: (pool.threads() > 1).then_some(pool),
            usual: Duration::ZERO,
        }
    }

    /// The caller and nobody else.
    pub fn alone() -> Self {
        Self::default()
    }

    /// Does `work` once to every item, each on one thread, and returns when all are done. Without help, as where the pool is busy,
    /// items are taken in order.
    ///
    /// # Panics
    /// When `work` panicked: the first panic goes on in the caller, after the other items are done if it was not alone.
    pub fn for_each<T: Send>(&mut self, items: &mut [T], work: impl Fn(&mut T) + Sync) {
        let count = items.len();
        let Some(pool) = self.pool.as_ref().filter(|_| count > 1) else {
            items.iter_mut().for_each(work);
            return;
        };
        let spent = AtomicU64::new(0);
        let timed = |item: &mut T| {
            let start = Instant::now();
            work(item);
            spent.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        };
        let expected = self.usual * count as u32;
        let mut done = 0;
        while done < count {
            let left = &mut items[done..];
            let so_far = Duration::from_nanos(spent.load(Ordering::Relaxed));
            let is_long = so_far.max(expected) > ALONE;
            if is_long && left.len() > 1 && together(pool, left, &timed) {
                break;
            }
            timed(&mut left[0]);
            done += 1;
        }
        self.usual = Duration::from_nanos(spent.into_inner() / count as u64);
    }
}

/// Shares `items` out among the threads of `pool`, unless it is busy: then nothing is done, and the answer is false.
fn together<T: Send>(pool: &Pool, items: &mut [T], work: &(impl Fn(&mut T) + Sync)) -> bool {
    let items: Vec<Mutex<&mut T>> = items.iter_mut().map(Mutex::new).collect();
    let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
    let ran = pool.try_run(items.len(), &|index| {
        // Only the thread that has this chunk ever asks.
        let mut item = items[index].lock().unwrap_or_else(PoisonError::into_inner);
        // The pool's threads must outlive a session that fails.
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| work(&mut item))) {
            panic
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(payload);
        }
    });
    if let Some(payload) = panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(payload);
    }
    ran
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;

    /// Long enough to make the caller ask for help at once.
    fn dawdle() {
        thread::sleep(2 * ALONE);
    }

    #[test]
    fn every_item_is_worked_on_once() {
        for mut crew in [Crew::alone(), Crew::new(0), Crew::new(2)] {
            for count in [0, 1, 2, 50] {
                let mut items = vec![0; count];
                crew.for_each(&mut items, |item| {
                    dawdle();
                    *item += 1;
                });
                assert!(items.iter().all(|&times| times == 1));
            }
        }
    }

    #[test]
    fn work_that_took_long_is_shared_out_from_the_first_item_on() {
        let mut crew = Crew {
            pool: Some(Arc::new(Pool::new(2))),
            ..Crew::alone()
        };
        let mut threads = || {
            let mut items = vec![None; 2];
            crew.for_each(&mut items, |item| {
                thread::sleep(20 * ALONE);
                *item = Some(thread::current().id());
            });
            items
        };
        // The first takes the time that the caller works alone, and the other is the last.
        let here = Some(thread::current().id());
        assert_eq!(threads(), [here, here]);
        // The other thread may be late on a busy machine.
        let shares = (0..50).any(|_| {
            let both = threads();
            both[0] != both[1]
        });
        let cores = thread::available_parallelism().map_or(1, usize::from);
        assert!(cores == 1 || shares);
    }

    #[test]
    fn a_caller_without_help_goes_on_alone_and_in_order() {
        let here = thread::current().id();
        let order = AtomicUsize::new(0);
        let mut items = vec![None; 8];
        Crew::alone().for_each(&mut items, |item| {
            dawdle();
            *item = Some((
                order.fetch_add(1, Ordering::Relaxed),
                thread::current().id(),
            ));
        });
        assert!(
            items
                .into_iter()
                .eq((0..8).map(|place| Some((place, here))))
        );
    }

    #[test]
    fn a_busy_pool_helps_nobody() {
        let pool = Pool::new(2);
        pool.run(2, &|_| {
            assert!(!together(&pool, &mut [0; 8], &|_: &mut i32| unreachable!()));
        });
        assert!(!together(
            &Pool::new(1),
            &mut [0; 8],
            &|_: &mut i32| unreachable!()
        ));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_as_it_was() {
        let pool = Pool::new(0);
        if pool.threads() == 1 {
            return;
        }
        let mut items: Vec<usize> = (0..64).collect();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            together(&pool, &mut items, &|item: &mut usize| {
                assert!(*item != 40, "session {item} fails");
                *item = 0;
            })
        }));
        let payload = outcome.unwrap_err();
        let message = payload.downcast_ref::<String>().map(String::as_str);
        assert_eq!(message, Some("session 40 fails"));
        assert_eq!(items.iter().sum::<usize>(), 40);
        assert!(together(&pool, &mut items, &|item: &mut usize| *item = 1));
        assert_eq!(items, [1; 64]);
    }
}
