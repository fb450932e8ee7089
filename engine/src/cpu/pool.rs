//! A fork-join thread pool for forwards: regions of microseconds, tens per forward.
//!
//! A general pool costs several microseconds per region, which is more than some regions take. Here a worker that has
//! just finished a region spins for a short while before it sleeps, so that the next region of the same forward finds
//! it awake. Chunks are claimed one by one, so a core that is busy elsewhere delays nothing but its own chunk.
//!
//! Models of one process share the cores. A forward holds the pool's [`Turn`] from its first region to its last, and
//! turns are given in the order of asking: a plain mutex would let a model that runs forwards back to back shut the
//! other one out for seconds.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How often an idle worker looks for the next region of the same forward, with nothing between two looks: about 40 µs.
const SPINS_BEFORE_YIELD_IDLE: u32 = 1_500;
/// How long it then looks for the next forward, letting other threads run between two looks, before it sleeps. Sampling
/// and a message to the other model take less than this, and waking a sleeper takes as long as a region.
const IDLE_BEFORE_SLEEP: Duration = Duration::from_micros(400);
/// How often a caller looks for its last chunk before it lets others run: about 50 µs.
const SPINS_BEFORE_YIELD: u32 = 2_000;

/// A region's body, called once per chunk index.
type Body<'a> = dyn Fn(usize) + Sync + 'a;

/// The address of the body in force. Only dereferenced by a thread that holds a chunk of the current region.
#[derive(Clone, Copy)]
struct BodyPointer(*const Body<'static>);
// SAFETY: the body is Sync, and the pointer is only followed while its region is unfinished.
unsafe impl Send for BodyPointer {}

struct Shared {
    /// Region number (high 32 bits) and chunks not yet claimed (low 32 bits).
    ticket: AtomicU64,
    /// Chunks claimed but not done, and chunks not claimed.
    pending: AtomicUsize,
    /// Body of the current region. Written only between regions.
    body: Mutex<Option<BodyPointer>>,
    panicked: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<bool>,
    wake: Condvar,
}

impl Shared {
    /// Claims a chunk of region `region`: its index, or `None` when all are claimed or the region is another.
    fn claim(&self, region: u32) -> Option<usize> {
        let mut seen = self.ticket.load(Ordering::Acquire);
        loop {
            let left = seen as u32;
            if (seen >> 32) as u32 != region || left == 0 {
                return None;
            }
            match self.ticket.compare_exchange_weak(
                seen,
                seen - 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(left as usize - 1),
                Err(now) => seen = now,
            }
        }
    }

    /// Works on region `region` until nothing is left to claim.
    fn work(&self, region: u32, body: &Body<'_>) {
        while let Some(chunk) = self.claim(region) {
            let done = Done(self);
            body(chunk);
            drop(done);
        }
    }

    /// A worker's life.
    fn worker(&self) {
        let mut last = 0;
        let mut spins = 0;
        let mut idle_since = None;
        loop {
            let ticket = self.ticket.load(Ordering::Acquire);
            let region = (ticket >> 32) as u32;
            if region != last && ticket as u32 != 0 {
                if let Some(chunk) = self.claim(region) {
                    let done = Done(self);
                    let body = lock(&self.body).expect("a claimed chunk's region has a body");
                    // SAFETY: this thread holds a chunk of the region, so `run` has not returned and the body lives.
                    let body = unsafe { &*body.0 };
                    body(chunk);
                    drop(done);
                    self.work(region, body);
                }
                last = region;
                spins = 0;
                idle_since = None;
            } else if spins < SPINS_BEFORE_YIELD_IDLE {
                spins += 1;
                std::hint::spin_loop();
            } else if idle_since.get_or_insert_with(Instant::now).elapsed() < IDLE_BEFORE_SLEEP {
                std::thread::yield_now();
            } else {
                let mut stop = lock(&self.sleep);
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                // A region published before this thread counted as a sleeper would not wake it: look once more.
                while !*stop && self.ticket.load(Ordering::SeqCst) == ticket {
                    stop = self.wake.wait(stop).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
                if *stop {
                    return;
                }
                spins = 0;
                idle_since = None;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a chunk as done, also when its body panics.
struct Done<'a>(&'a Shared);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.panicked.store(true, Ordering::Relaxed);
        }
        self.0.pending.fetch_sub(1, Ordering::Release);
    }
}

/// A pool of worker threads; the calling thread works too.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    /// The number of the last region; held while one runs.
    region: Mutex<u32>,
    queue: Mutex<Queue>,
    next: Condvar,
    threads: usize,
}

/// Who may compute: tickets are given in order and served in order.
#[derive(Default)]
struct Queue {
    given: u64,
    served: u64,
}

/// The right to compute, until dropped.
pub(crate) struct Turn {
    pool: Arc<Pool>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut queue = lock(&self.pool.queue);
        queue.served += 1;
        if queue.given > queue.served {
            drop(queue);
            self.pool.next.notify_all();
        }
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller counted; 0 takes all cores.
    pub(crate) fn new(threads: usize) -> Self {
        let threads = Self::threads_for(threads);
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            pending: AtomicUsize::new(0),
            body: Mutex::new(None),
            panicked: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(false),
            wake: Condvar::new(),
        });
        for index in 1..threads {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("specattn-cpu-{index}"))
                .spawn(move || shared.worker())
                .expect("the system can start a thread");
        }
        Self {
            shared,
            region: Mutex::new(0),
            queue: Mutex::new(Queue::default()),
            next: Condvar::new(),
            threads,
        }
    }

    /// How many threads a pool told to have `threads` gets.
    pub(crate) fn threads_for(threads: usize) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if threads == 0 {
            cores
        } else {
            threads.min(cores)
        }
    }

    /// The pool that all models of this process share, made on first use with `threads` threads.
    pub(crate) fn shared(threads: usize) -> Arc<Self> {
        static POOL: OnceLock<Arc<Pool>> = OnceLock::new();
        Arc::clone(POOL.get_or_init(|| Arc::new(Self::new(threads))))
    }

    /// Waits for this caller's turn to compute.
    pub(crate) fn turn(self: &Arc<Self>) -> Turn {
        let mut queue = lock(&self.queue);
        let ticket = queue.given;
        queue.given += 1;
        while queue.served != ticket {
            queue = self
                .next
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Turn {
            pool: Arc::clone(self),
        }
    }

    /// Threads, the caller counted.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `body` once for every index in `0..chunks`, on all threads, and returns when all are done.
    ///
    /// # Panics
    /// When a body panicked.
    pub(crate) fn run(&self, chunks: usize, body: &Body<'_>) {
        if chunks <= 1 || self.threads == 1 {
            (0..chunks).for_each(body);
            return;
        }
        self.run_region(lock(&self.region), chunks, body);
    }

    /// As [`Pool::run`], unless there is nobody to help: false, and nothing was done, where another region runs or the pool has no
    /// other thread.
    ///
    /// # Panics
    /// When a body panicked.
    pub(crate) fn try_run(&self, chunks: usize, body: &Body<'_>) -> bool {
        let region = match self.region.try_lock() {
            Ok(region) => region,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let helps = self.threads > 1;
        if helps && chunks > 0 {
            self.run_region(region, chunks, body);
        }
        helps
    }

    fn run_region(&self, mut last: MutexGuard<'_, u32>, chunks: usize, body: &Body<'_>) {
        let shared = &*self.shared;
        *last = last.wrapping_add(1);
        let region = *last;
        let chunks = u32::try_from(chunks).expect("fewer than 2^32 chunks");
        let pointer = std::ptr::from_ref(body);
        // SAFETY: only the lifetime changes; threads follow the pointer only while they hold a chunk, and this
        // function returns after the last chunk is done.
        let pointer =
            unsafe { std::mem::transmute::<*const Body<'_>, *const Body<'static>>(pointer) };
        *lock(&shared.body) = Some(BodyPointer(pointer));
        shared.pending.store(chunks as usize, Ordering::Relaxed);
        shared.ticket.store(
            u64::from(region) << 32 | u64::from(chunks),
            Ordering::SeqCst,
        );
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleep));
            shared.wake.notify_all();
        }
        // On a panic here chunks would stay unclaimed and the body would die under the workers: finish first.
        let outcome =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| shared.work(region, body)));
        if outcome.is_err() {
            while shared.claim(region).is_some() {
                shared.pending.fetch_sub(1, Ordering::Release);
            }
        }
        let mut spins = 0;
        while shared.pending.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        *lock(&shared.body) = None;
        drop(last);
        match outcome {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => assert!(
                !shared.panicked.load(Ordering::Relaxed),
                "a compute thread panicked"
            ),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        *lock(&self.shared.sleep) = true;
        // Workers that spin will sleep soon and see the flag.
        self.shared.wake.notify_all();
    }
}

/// A mutable slice that several threads write at disjoint places.
#[derive(Clone, Copy)]
pub(crate) struct SharedSlice<T> {
    pointer: *mut T,
    len: usize,
}
// SAFETY: access goes through `range`, whose callers promise disjoint ranges.
unsafe impl<T: Send> Send for SharedSlice<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedSlice<T> {}

impl<T> SharedSlice<T> {
    /// Wraps a slice for the duration of a region.
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self {
            pointer: slice.as_mut_ptr(),
            len: slice.len(),
        }
    }

    /// All elements.
    ///
    /// # Safety
    /// As [`SharedSlice::range`].
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn all(&self) -> &mut [T] {
        // SAFETY: the caller's promise is the callee's.
        unsafe { self.range(0, self.len) }
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// No other thread may hold an overlapping range, and the wrapped slice must be alive.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        assert!(
            start <= self.len && len <= self.len - start,
            "range within the slice"
        );
        // SAFETY: in bounds by the assertion; unshared by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_runs_once() {
        let pool = Pool::new(0);
        for chunks in [0, 1, 2, 3, 17, 1000] {
            let mut counts = vec![0u8; chunks];
            let shared = SharedSlice::new(&mut counts);
            // SAFETY: each chunk touches its own element.
            pool.run(chunks, &|i| unsafe { shared.range(i, 1)[0] += 1 });
            assert!(counts.iter().all(|&c| c == 1));
        }
    }

    #[test]
    fn callers_take_turns() {
        let pool = Arc::new(Pool::new(0));
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(8, &|_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 4 * 500 * 8);
    }

    #[test]
    fn turns_are_given_in_the_order_of_asking() {
        let pool = Arc::new(Pool::new(1));
        let order = Mutex::new(Vec::new());
        let held = pool.turn();
        std::thread::scope(|scope| {
            for i in 0..4 {
                let (pool, order) = (&pool, &order);
                scope.spawn(move || {
                    let _turn = pool.turn();
                    lock(order).push(i);
                });
                while lock(&pool.queue).given < i + 2 {
                    std::thread::yield_now();
                }
            }
            drop(held);
        });
        assert_eq!(*lock(&order), [0, 1, 2, 3]);
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        let pool = Pool::new(0);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(64, &|i| assert!(i != 40, "chunk 40 fails"));
        }));
        assert!(outcome.is_err());
    }
}
