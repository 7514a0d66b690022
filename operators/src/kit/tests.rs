//! The run loop against a scripted bus.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arqon_proto::wire::{self, ErrorCode};
use arqon_sdk::{Error, Event, NewEvent};
use prost::Message;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use super::{
    bus::{Bus, Lease, Queue},
    run_loop::run_on,
    *,
};

/// Nothing here takes so long, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// For so long it is watched that something does not happen.
const WATCH: Duration = Duration::from_millis(300);
const HEARTBEAT: Duration = Duration::from_millis(20);

fn server_error(code: ErrorCode) -> Error {
    wire::Error { code: code.into(), message: "as scripted".into(), ..Default::default() }.into()
}

/// How a lease ended.
#[derive(Debug, PartialEq)]
enum End {
    Completed(String),
    GivenBack(Duration),
    Dropped,
}

struct FakeLease {
    event: Event,
    settled: AtomicBool,
    ends: mpsc::UnboundedSender<(u64, End)>,
    refusals: Mutex<VecDeque<Error>>,
    lost: watch::Receiver<bool>,
}

impl FakeLease {
    fn end(&self, end: End) {
        self.settled.store(true, Ordering::SeqCst);
        let _ = self.ends.send((self.event.offset, end));
    }
}

impl Drop for FakeLease {
    fn drop(&mut self) {
        if !self.settled.load(Ordering::SeqCst) {
            let _ = self.ends.send((self.event.offset, End::Dropped));
        }
    }
}

impl Lease for FakeLease {
    fn job(&self) -> &Event {
        &self.event
    }

    fn attempt(&self) -> u32 {
        1
    }

    async fn lost(&self) {
        if self.lost.clone().wait_for(|lost| *lost).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    async fn complete(&self, topic: &str, result: NewEvent) -> Result<(), Error> {
        assert_eq!(topic, "echo.results");
        assert_eq!(result.id, Some(result_id(&self.event, "echo")));
        if let Some(error) = self.refusals.lock().unwrap().pop_front() {
            return Err(error);
        }
        self.end(End::Completed(String::from_utf8(result.payload.to_vec()).unwrap()));
        Ok(())
    }

    async fn give_back(&self, delay: Duration) -> Result<(), Error> {
        self.end(End::GivenBack(delay));
        Ok(())
    }
}

struct FakeQueue {
    script: mpsc::UnboundedReceiver<Result<FakeLease, Error>>,
    paused: Arc<AtomicBool>,
}

impl Queue for FakeQueue {
    type Lease = FakeLease;

    async fn next(&mut self) -> Result<FakeLease, Error> {
        self.paused.store(false, Ordering::SeqCst);
        match self.script.recv().await {
            Some(next) => next,
            None => std::future::pending().await,
        }
    }

    fn pause(&mut self) {
        self.paused.store(true, Ordering::SeqCst);
    }
}

#[derive(Clone)]
struct FakeBus {
    announced: mpsc::UnboundedSender<NewEvent>,
    down: Arc<AtomicBool>,
    unknown: Arc<Mutex<Option<&'static str>>>,
}

impl Bus for FakeBus {
    async fn announce(&self, event: NewEvent) -> Result<(), Error> {
        if self.down.load(Ordering::SeqCst) {
            return Err(server_error(ErrorCode::Overloaded));
        }
        self.announced.send(event).unwrap();
        Ok(())
    }

    async fn check_topic(&self, topic: &str) -> Result<(), Error> {
        match *self.unknown.lock().unwrap() {
            Some(unknown) if unknown == topic => Err(server_error(ErrorCode::TargetNotFound)),
            _ => Ok(()),
        }
    }
}

/// Does what the payload says.
struct Scripted {
    started: mpsc::UnboundedSender<u64>,
    release: watch::Receiver<bool>,
    ready: watch::Receiver<bool>,
}

impl Operator for Scripted {
    async fn run(&self, job: &Event, _attempt: u32) -> Result<NewEvent, JobError> {
        let _ = self.started.send(job.offset);
        match std::str::from_utf8(&job.payload).unwrap() {
            "fail" => Err(JobError::failed("no such colour")),
            "retry" => Err(JobError::retry(Duration::from_secs(7), "busy")),
            "panic" => panic!("out of paint"),
            "wait" => {
                self.release.clone().wait_for(|open| *open).await.unwrap();
                Ok(NewEvent::new("waited"))
            }
            text => Ok(NewEvent::new(text.to_uppercase())),
        }
    }

    async fn ready(&self) {
        self.ready.clone().wait_for(|ready| *ready).await.unwrap();
    }
}

/// An operator that runs on a scripted bus.
struct Stage {
    bus: FakeBus,
    announced: mpsc::UnboundedReceiver<NewEvent>,
    script: mpsc::UnboundedSender<Result<FakeLease, Error>>,
    paused: Arc<AtomicBool>,
    ends_sender: mpsc::UnboundedSender<(u64, End)>,
    ends: mpsc::UnboundedReceiver<(u64, End)>,
    started: mpsc::UnboundedReceiver<u64>,
    release: watch::Sender<bool>,
    ready: watch::Sender<bool>,
    lost: watch::Sender<bool>,
    metrics: Metrics,
    shutdown: oneshot::Sender<()>,
    running: JoinHandle<Result<(), crate::Error>>,
}

impl Stage {
    fn open() -> Self {
        Self::open_with(None, PATIENCE, HEARTBEAT)
    }

    fn open_with(unknown: Option<&'static str>, drain: Duration, heartbeat: Duration) -> Self {
        let (announce, announced) = mpsc::unbounded_channel();
        let bus = FakeBus { announced: announce, down: Arc::default(), unknown: Arc::new(Mutex::new(unknown)) };
        let (script, receiver) = mpsc::unbounded_channel();
        let paused = Arc::<AtomicBool>::default();
        let queue = FakeQueue { script: receiver, paused: paused.clone() };
        let (ends_sender, ends) = mpsc::unbounded_channel();
        let (starts, started) = mpsc::unbounded_channel();
        let (release, released) = watch::channel(false);
        let (ready, is_ready) = watch::channel(true);
        let lost = watch::Sender::new(false);
        let (shutdown, stopped) = oneshot::channel::<()>();
        let options = RunOptions { parallelism: 2, drain, ..RunOptions::new("echo.jobs", "echo") };
        let metrics = options.metrics.clone();
        let registration = wire::OperatorRegistration {
            operator_id: "echo-1".into(),
            operator_type: "generic".into(),
            version: "1".into(),
            hardware_profile: "cpu".into(),
            stage: "staging".into(),
            ..Default::default()
        };
        let operator = Scripted { started: starts, release: released, ready: is_ready };
        let on = bus.clone();
        let running = tokio::spawn(async move {
            let shutdown = async move { stopped.await.unwrap_or_default() };
            run_on(on, queue, registration, options, operator, heartbeat, shutdown).await
        });
        Self {
            bus,
            announced,
            script,
            paused,
            ends_sender,
            ends,
            started,
            release,
            ready,
            lost,
            metrics,
            shutdown,
            running,
        }
    }

    fn job(&self, offset: u64, payload: &str) {
        self.job_with(offset, payload, []);
    }

    fn job_with(&self, offset: u64, payload: &str, refusals: impl IntoIterator<Item = Error>) {
        let event = Event { offset, topic: "echo.jobs".into(), payload: payload.to_owned().into(), ..Event::default() };
        let _ = self.script.send(Ok(FakeLease {
            event,
            settled: AtomicBool::new(false),
            ends: self.ends_sender.clone(),
            refusals: Mutex::new(refusals.into_iter().collect()),
            lost: self.lost.subscribe(),
        }));
    }

    async fn end(&mut self) -> (u64, End) {
        tokio::time::timeout(PATIENCE, self.ends.recv()).await.expect("a job ends").unwrap()
    }

    /// The next message to the bus: its schema, and whether it says goodbye.
    async fn announcement(&mut self) -> (String, bool) {
        let event = tokio::time::timeout(PATIENCE, self.announced.recv()).await.expect("something is said").unwrap();
        assert_eq!(&event.key[..], b"echo-1");
        let leaving = match event.schema.as_str() {
            HEARTBEAT_SCHEMA => wire::OperatorHeartbeat::decode(event.payload).unwrap().leaving,
            _ => {
                let registration = wire::OperatorRegistration::decode(event.payload).unwrap();
                assert_eq!(registration.resource_limits.unwrap().max_parallel_jobs, 2);
                false
            }
        };
        (event.schema, leaving)
    }

    async fn until_not_ready(&self, reason: Option<&str>) {
        let reached = async {
            while self.metrics.not_ready() != reason {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, reached).await.expect("it becomes so");
    }

    async fn stop(self) -> Result<(), crate::Error> {
        let _ = self.shutdown.send(());
        self.running.await.unwrap()
    }
}

fn failure(message: &str) -> End {
    End::Completed(format!("{{\"job_id\":\"00000000-0000-0000-0000-000000000000\",\"error\":\"{message}\"}}"))
}

#[tokio::test]
async fn every_job_ends_as_its_operator_says() {
    let mut stage = Stage::open();
    for (offset, payload, end) in [
        (0, "hello", End::Completed("HELLO".into())),
        (1, "fail", failure("no such colour")),
        (2, "panic", failure("the operator panicked: out of paint")),
        (3, "retry", End::GivenBack(Duration::from_secs(7))),
        (4, "again", End::Completed("AGAIN".into())),
    ] {
        stage.job(offset, payload);
        assert_eq!(stage.end().await, (offset, end));
    }
    let metrics = stage.metrics.clone();
    stage.stop().await.unwrap();
    assert_eq!(metrics.jobs(JobEnd::Done), 2);
    assert_eq!(metrics.jobs(JobEnd::Failed), 2);
    assert_eq!(metrics.jobs(JobEnd::Retried), 1);
    assert!(metrics.text().contains("arqon_operator_jobs_total{end=\"done\"} 2"), "{}", metrics.text());
}

#[tokio::test]
async fn no_more_jobs_run_at_a_time_than_allowed() {
    let mut stage = Stage::open();
    (0..3).for_each(|offset| stage.job(offset, "wait"));
    assert_eq!(stage.started.recv().await, Some(0));
    assert_eq!(stage.started.recv().await, Some(1));
    assert!(tokio::time::timeout(WATCH, stage.started.recv()).await.is_err());
    assert_eq!(stage.metrics.running(), 2);
    stage.release.send(true).unwrap();
    assert_eq!(stage.started.recv().await, Some(2));
    for _ in 0..3 {
        assert_eq!(stage.end().await.1, End::Completed("waited".into()));
    }
}

#[tokio::test]
async fn a_refused_result_becomes_a_failure_and_a_lost_answer_gives_the_job_back() {
    let mut stage = Stage::open();
    let too_large = Error::Invalid { field: "payload".into(), reason: "has 2 bytes, the limit is 1".into() };
    stage.job_with(0, "x", [too_large]);
    assert_eq!(stage.end().await, (0, failure("the result is refused: payload has 2 bytes, the limit is 1")));
    stage.job_with(1, "x", [server_error(ErrorCode::PolicyBlocked), server_error(ErrorCode::PolicyBlocked)]);
    assert_eq!(stage.end().await, (1, End::Dropped));
    stage.job_with(2, "x", [server_error(ErrorCode::Overloaded)]);
    assert_eq!(stage.end().await, (2, End::Dropped));
    stage.job_with(3, "x", [Error::LeaseLost]);
    assert_eq!(stage.end().await, (3, End::Dropped));
    assert_eq!(stage.metrics.jobs(JobEnd::Returned), 2);
    assert_eq!(stage.metrics.jobs(JobEnd::Lost), 1);
    stage.stop().await.unwrap();
}

#[tokio::test]
async fn work_whose_lease_is_lost_is_abandoned() {
    let mut stage = Stage::open();
    stage.job(0, "wait");
    assert_eq!(stage.started.recv().await, Some(0));
    stage.lost.send(true).unwrap();
    assert_eq!(stage.end().await, (0, End::Dropped));
    assert_eq!(stage.metrics.jobs(JobEnd::Lost), 1);
}

#[tokio::test]
async fn a_stop_lets_running_jobs_end_and_says_goodbye_last() {
    let mut stage = Stage::open();
    assert_eq!(stage.announcement().await, (REGISTRATION_SCHEMA.into(), false));
    stage.job(0, "wait");
    stage.started.recv().await;
    let release = std::mem::replace(&mut stage.release, watch::Sender::new(false));
    let (mut ends, mut announced) = (stage.ends, stage.announced);
    stage.shutdown.send(()).unwrap();
    // The queue is gone: nothing is leased any more.
    stage.script.closed().await;
    release.send(true).unwrap();
    stage.running.await.unwrap().unwrap();
    assert_eq!(ends.recv().await, Some((0, End::Completed("waited".into()))));
    drop(stage.bus);
    let mut last = None;
    while let Some(event) = announced.recv().await {
        last = Some(event);
    }
    assert!(wire::OperatorHeartbeat::decode(last.unwrap().payload).unwrap().leaving);
}

#[tokio::test]
async fn a_stop_gives_back_what_does_not_end_in_time() {
    let mut stage = Stage::open_with(None, WATCH, HEARTBEAT);
    stage.job(0, "wait");
    stage.started.recv().await;
    let started = tokio::time::Instant::now();
    let (mut ends, script) = (stage.ends, stage.script.clone());
    stage.shutdown.send(()).unwrap();
    stage.running.await.unwrap().unwrap();
    assert_eq!(ends.recv().await, Some((0, End::GivenBack(Duration::ZERO))));
    assert!(started.elapsed() >= WATCH, "the drain time");
    assert!(script.is_closed(), "no more jobs are leased");
    assert_eq!(stage.metrics.not_ready(), Some("not taking jobs"));
}

#[tokio::test]
async fn an_operator_that_the_bus_forgot_registers_again_and_goes_on() {
    // No heartbeat comes in between.
    let mut stage = Stage::open_with(None, PATIENCE, 2 * PATIENCE);
    assert_eq!(stage.announcement().await.0, REGISTRATION_SCHEMA);
    for _ in 0..6 {
        stage.script.send(Err(server_error(ErrorCode::TargetNotFound))).map_err(|_| ()).unwrap();
    }
    stage.job(0, "still here");
    assert_eq!(stage.announcement().await.0, REGISTRATION_SCHEMA);
    assert_eq!(stage.end().await, (0, End::Completed("STILL HERE".into())));
    stage.stop().await.unwrap();
}

#[tokio::test]
async fn what_the_bus_refuses_for_good_ends_the_operator_with_its_reason() {
    let stage = Stage::open_with(Some("echo.results"), PATIENCE, HEARTBEAT);
    assert!(stage.running.await.unwrap().unwrap_err().to_string().contains("TARGET_NOT_FOUND"));

    let stage = Stage::open();
    stage.script.send(Err(server_error(ErrorCode::AuthorizationDenied))).map_err(|_| ()).unwrap();
    assert!(stage.running.await.unwrap().unwrap_err().to_string().contains("AUTHORIZATION_DENIED"));

    let stage = Stage::open();
    stage.job_with(0, "x", [server_error(ErrorCode::AuthorizationDenied)]);
    assert!(stage.running.await.unwrap().unwrap_err().to_string().contains("AUTHORIZATION_DENIED"));

    let mut stage = Stage::open();
    stage.announcement().await;
    *stage.bus.unknown.lock().unwrap() = Some("echo.jobs");
    stage.script.send(Err(server_error(ErrorCode::TargetNotFound))).map_err(|_| ()).unwrap();
    assert!(stage.running.await.unwrap().unwrap_err().to_string().contains("TARGET_NOT_FOUND"));
}

#[tokio::test]
async fn trouble_with_the_bus_is_waited_out() {
    let mut stage = Stage::open();
    for code in [ErrorCode::Overloaded, ErrorCode::InternalError, ErrorCode::NotLeader] {
        stage.script.send(Err(server_error(code))).map_err(|_| ()).unwrap();
    }
    stage.job(0, "after");
    assert_eq!(stage.end().await, (0, End::Completed("AFTER".into())));
}

#[tokio::test]
async fn heartbeats_go_on_and_a_registration_follows_silence() {
    let mut stage = Stage::open();
    assert_eq!(stage.announcement().await.0, REGISTRATION_SCHEMA);
    for _ in 0..3 {
        assert_eq!(stage.announcement().await.0, HEARTBEAT_SCHEMA);
    }
    stage.bus.down.store(true, Ordering::SeqCst);
    stage.until_not_ready(Some("not registered")).await;
    while stage.announced.try_recv().is_ok() {}
    stage.bus.down.store(false, Ordering::SeqCst);
    assert_eq!(stage.announcement().await.0, REGISTRATION_SCHEMA);
    assert_eq!(stage.announcement().await.0, HEARTBEAT_SCHEMA);
    stage.until_not_ready(None).await;
    let mut later = Vec::new();
    for _ in 0..13 {
        later.push(stage.announcement().await.0);
    }
    assert!(later.iter().any(|schema| schema == REGISTRATION_SCHEMA), "repeated for nodes that never saw it");
}

#[tokio::test]
async fn an_operator_that_is_not_ready_holds_no_jobs() {
    let mut stage = Stage::open();
    stage.job(0, "first");
    stage.end().await;
    stage.ready.send(false).unwrap();
    // The wait for this one began before.
    stage.job(1, "second");
    stage.end().await;
    stage.job(2, "third");
    assert!(tokio::time::timeout(WATCH, stage.ends.recv()).await.is_err());
    assert!(stage.paused.load(Ordering::SeqCst));
    assert_eq!(stage.metrics.not_ready(), Some("not taking jobs"));
    stage.ready.send(true).unwrap();
    assert_eq!(stage.end().await, (2, End::Completed("THIRD".into())));
}
