//! The mesh's interface and all that hangs on it: raised in order, kept as planned, taken down.
//!
//! Order is the point. The device is created down, the programs are attached, the newest netmap's
//! tables are loaded, and only then do addresses, routes and the link itself come up: at no moment
//! does an interface carry packets that nobody judges. A killed agent leaves a kernel device with
//! its programs pinned, and its successor adopts both. Only `mesh down` takes the device away.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use mesh_core::agent::Actuator;
use mesh_core::desired::{Desired, MTU};
use mesh_core::health::{Condition, Severity};
use mesh_core::routes;
use rustix::net::{AddressFamily, SocketType};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::brief;
use crate::dns;
use crate::eventloop::Told;
use crate::flow_log::FlowLog;
use crate::net::Net;
use crate::wg::{self, Backend, Choice, Interface};

mod actuate;
mod enforcer;
mod log_flows;
mod watch_filter;

pub use enforcer::Enforcer;

use actuate::{Control, actuate};
use enforcer::Raised;
pub use log_flows::{AskUsage, PeerUsage};
use log_flows::{Feed, Over};
use watch_filter::Seen;

/// Until a raise that failed is tried again.
const RETRY: Duration = Duration::from_secs(3);
/// How long readers of the device may keep it from being removed.
const RELEASE: Duration = Duration::from_secs(3);

/// The plans, newest only.
pub type Plans = watch::Receiver<Option<Arc<Desired>>>;

#[derive(Clone, Debug)]
pub struct Settings {
    pub backend: Choice,
    pub interface: String,
    pub pin_dir: PathBuf,
    /// Where the numbers of guards are noted.
    pub guard_numbers: PathBuf,
    pub ebpf_object: Option<PathBuf>,
    pub uapi_dir: Option<PathBuf>,
    /// `None`: no MagicDNS.
    pub dns: Option<dns::Options>,
}

/// Whether the device may be up. Closed while its filter is not where it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Door {
    Open,
    Closed,
}

/// For those who look: the device and the filter, while they stand.
#[derive(Clone, Debug)]
pub struct Handle {
    pub backend: Arc<Backend>,
    pub enforcer: Arc<Enforcer>,
    pub usage: mpsc::Sender<AskUsage>,
}

/// What the supervisor is told, and whom it tells.
#[derive(Debug)]
pub struct Ports {
    pub plans: Plans,
    /// Changes a little after anything did in links, addresses, routes or rules.
    pub around: watch::Receiver<()>,
    /// Changes with any link, at once.
    pub links: watch::Receiver<()>,
    pub told: mpsc::Sender<Told>,
    pub handle: watch::Sender<Option<Handle>>,
    pub flow_log: FlowLog,
}

/// Why a stack ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// The plan is to have no device.
    Down,
    /// Somebody removed the interface.
    Lost,
    /// The agent stops.
    Stop,
}

/// Raises a stack whenever there is a plan, until `stop`.
pub async fn supervise(settings: Settings, mut ports: Ports, stop: CancellationToken) {
    let mut is_first = true;
    let mut planned = false;
    let mut left = is_left(&settings.interface, &settings.pin_dir);
    let seen = Seen::new();
    loop {
        let wanted = ports.plans.borrow_and_update().is_some();
        if !wanted && !std::mem::take(&mut left) {
            if std::mem::take(&mut planned) {
                let _ = ports.told.send(Told::TornDown).await;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = ports.plans.changed() => if changed.is_err() { return },
            }
            continue;
        }
        planned = true;
        left = false;
        let raised = enforcer::raise(&settings, std::mem::take(&mut is_first)).await;
        let failure = raised.as_ref().err().map(not_ready);
        let told = Told::Condition("InterfaceNotReady", failure);
        let _ = ports.told.send(told).await;
        match raised {
            Ok(raised) => match run(&settings, raised, &seen, &mut ports, &stop).await {
                End::Stop => return,
                End::Lost => disown(&settings, &ports).await,
                End::Down => {}
            },
            Err(error) => {
                tracing::warn!(error = brief(&error), "raise the interface");
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(RETRY) => {}
                    changed = ports.plans.changed() => if changed.is_err() { return },
                }
            }
        }
    }
}

/// Whether an agent before us left its device. Where there is no plan, it was told to take it away and
/// died before it could.
fn is_left(interface: &str, pin_dir: &Path) -> bool {
    let mut pins = std::fs::read_dir(pin_dir).into_iter().flatten();
    index_of(interface).is_some() && pins.next().is_some()
}

/// What was applied is applied no more.
async fn disown(settings: &Settings, ports: &Ports) {
    let plan = ports.plans.borrow().clone();
    let Some(plan) = plan else { return };
    for actuator in at_work(settings.dns.as_ref()) {
        let lost = Err("the interface was removed".to_owned());
        let told = Told::Actuator(actuator, plan.revision, lost);
        let _ = ports.told.send(told).await;
    }
}

/// The actuators that [`spawn`] starts. Of another nobody would ever report that it is well again.
fn at_work(dns: Option<&dns::Options>) -> impl Iterator<Item = Actuator> {
    Actuator::ALL
        .into_iter()
        .filter(move |which| *which != Actuator::Dns || dns.is_some())
}

fn not_ready(error: &anyhow::Error) -> Condition {
    Condition {
        severity: Severity::Error,
        text: format!("the mesh's interface cannot be made: {}", brief(error)),
        next_step: "the agent keeps trying; it needs CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON, /dev/net/tun, and the interface's name for itself",
    }
}

/// One stack, from attached programs to its end.
async fn run(
    settings: &Settings,
    raised: Raised,
    seen: &Seen,
    ports: &mut Ports,
    stop: &CancellationToken,
) -> End {
    let Raised {
        backend,
        enforcer,
        conditions,
        found,
    } = raised;
    for (name, condition) in conditions {
        let _ = ports.told.send(Told::Condition(name, condition)).await;
    }
    seen.begin(found);
    let interface = backend.interface();
    let (usage, asked) = mpsc::channel(1);
    let handle = Handle {
        backend: Arc::new(backend),
        enforcer: Arc::new(enforcer),
        usage,
    };
    ports.handle.send_replace(Some(handle.clone()));
    let end = match Net::new().await {
        Ok(net) => {
            let net = Arc::new(net);
            let (over, ending) = oneshot::channel();
            let questions = (asked, ending);
            let mut tasks = spawn(settings, &handle, questions, &net, &interface, ports, seen);
            let end = watch_over(&interface, ports, stop).await;
            let _ = over.send(match takes_device_away(end, &handle.backend) {
                true => Over::WithItsFlows,
                false => Over::WithoutItsFlows,
            });
            // It hears no more questions when it has told the last.
            let _ = tokio::time::timeout(RELEASE, handle.usage.closed()).await;
            tasks.abort_all();
            while tasks.join_next().await.is_some() {}
            if takes_device_away(end, &handle.backend) {
                // The interface first: without addresses and down it carries nothing. An agent that
                // is only stopped leaves what is for the mesh unreachable, not in the clear.
                let plan = ports.plans.borrow().clone();
                let bare = routes::Config {
                    mtu: MTU.into(),
                    only_mesh: plan
                        .map(|plan| plan.routes.only_mesh.clone())
                        .unwrap_or_default(),
                    table: routes::TABLE,
                    ..routes::Config::default()
                };
                if let Err(error) = net.apply(&interface, &bare).await {
                    tracing::warn!(error = brief(&error), "take the interface down");
                }
            }
            end
        }
        Err(error) => {
            tracing::warn!(error = brief(&error), "reach the kernel's routing");
            tokio::time::sleep(RETRY).await;
            End::Lost
        }
    };
    ports.handle.send_replace(None);
    if let Err(error) = release(handle, end).await {
        tracing::warn!(error = brief(&error), "remove the interface");
    }
    end
}

/// Starts the actuators; all but the filter's wait until a first policy is loaded.
fn spawn(
    settings: &Settings,
    handle: &Handle,
    (asked, ending): (mpsc::Receiver<AskUsage>, oneshot::Receiver<Over>),
    net: &Arc<Net>,
    interface: &Interface,
    ports: &Ports,
    seen: &Seen,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let (loaded, loading) = watch::channel(false);
    let control = |which| Control {
        which,
        plans: ports.plans.clone(),
        told: ports.told.clone(),
    };
    let (ended, endings) = mpsc::channel(1);
    let links = ports.links.clone();
    let told = ports.told.clone();
    let filter = actuate::Filter::new(handle.enforcer.clone(), links, interface, ended, told);
    let first = actuate(filter, control(Actuator::Dataplane), Some(loaded));
    tasks.spawn(first.instrument(tracing::info_span!("dataplane")));

    let peers = actuate::Peers(handle.backend.clone());
    let task = actuate(peers, control(Actuator::WireGuard), None);
    tasks.spawn(actuate::after(loading.clone(), task).instrument(tracing::info_span!("wireguard")));

    let (door, doors) = watch::channel(Door::Open);
    let watch = watch_filter::run(
        handle.enforcer.clone(),
        net.clone(),
        interface.clone(),
        ports.around.clone(),
        ports.told.clone(),
        door,
        seen.clone(),
    );
    tasks.spawn(watch.instrument(tracing::info_span!("dataplane")));

    let place = actuate::Place::new(net.clone(), interface.clone(), ports.around.clone(), doors);
    let task = actuate(place, control(Actuator::Routes), None);
    tasks.spawn(actuate::after(loading.clone(), task).instrument(tracing::info_span!("routes")));

    if let Some(options) = settings.dns.clone() {
        let names = actuate::Names(dns::Actuator::new(options));
        let task = actuate(names, control(Actuator::Dns), None);
        tasks.spawn(actuate::after(loading, task).instrument(tracing::info_span!("dns")));
    }
    if let Some(events) = handle.enforcer.events() {
        let feed = Feed {
            enforcer: handle.enforcer.clone(),
            plans: ports.plans.clone(),
            log: ports.flow_log.clone(),
        };
        let task = feed.run(events, endings, asked, ending);
        tasks.spawn(task.instrument(tracing::info_span!("flow_log")));
    }
    tasks
}

/// Waits for the end of a stack.
async fn watch_over(interface: &Interface, ports: &mut Ports, stop: &CancellationToken) -> End {
    loop {
        if ports.plans.borrow_and_update().is_none() {
            return End::Down;
        }
        tokio::select! {
            () = stop.cancelled() => return End::Stop,
            changed = ports.plans.changed() => {
                if changed.is_err() {
                    return End::Stop;
                }
            }
            changed = ports.around.changed() => {
                if changed.is_err() {
                    return End::Stop;
                }
                if index_of(&interface.name) != Some(interface.index) {
                    tracing::warn!(interface = interface.name, "somebody removed the interface");
                    return End::Lost;
                }
            }
        }
    }
}

/// A userspace device ends with the agent; the kernel's only when the plan says so.
fn takes_device_away(end: End, backend: &Backend) -> bool {
    match (end, backend) {
        (End::Down, _) | (End::Stop, Backend::Userspace(_)) => true,
        (End::Stop, Backend::Kernel(_)) | (End::Lost, _) => false,
    }
}

/// Lets go of the device, or takes it away. The kernel's stays when the agent stops: its programs
/// are pinned and go on judging.
async fn release(handle: Handle, end: End) -> anyhow::Result<()> {
    let Handle {
        backend, enforcer, ..
    } = handle;
    if end != End::Lost && !takes_device_away(end, &backend) {
        return Ok(());
    }
    let enforcer = sole(enforcer).await.context("the filter is in use")?;
    if end == End::Lost {
        // The links died with the device; what is pinned is taken over by the next attach.
        drop(enforcer);
    } else {
        enforcer.detach().context("detach the programs")?;
    }
    match sole(backend).await.context("the device is in use")? {
        Backend::Kernel(device) if end == End::Down => device.remove().await,
        Backend::Kernel(_) | Backend::Userspace(_) => Ok(()),
    }
}

/// The value, once nobody else looks at it.
async fn sole<T>(mut shared: Arc<T>) -> Option<T> {
    let deadline = tokio::time::Instant::now() + RELEASE;
    loop {
        shared = match Arc::try_unwrap(shared) {
            Ok(value) => return Some(value),
            Err(shared) => shared,
        };
        if tokio::time::Instant::now() >= deadline {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The index of an interface, if there is one of that name. Asked of the kernel and not of /sys,
/// which may show another network namespace than the process is in.
pub fn index_of(name: &str) -> Option<u32> {
    let any = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok()?;
    rustix::net::netdevice::name_to_index(any, name).ok()
}

/// How the device is to be opened.
fn open_options(settings: &Settings, filter: Option<wg::Filter>) -> wg::OpenOptions {
    wg::OpenOptions {
        name: settings.interface.clone(),
        mtu: MTU.into(),
        fwmark: routes::FWMARK,
        filter,
        uapi_dir: settings.uapi_dir.clone(),
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::agent::Actuator;

    use super::{at_work, dns, is_left};

    #[test]
    fn without_magic_dns_nobody_is_to_fail_at_names() {
        let without = [Actuator::WireGuard, Actuator::Routes, Actuator::Dataplane];
        assert_eq!(at_work(None).collect::<Vec<_>>(), without);
        let options = dns::Options {
            interface: "mesh0".to_owned(),
            port: 53,
            helper: None,
            upstreams: None,
        };
        assert_eq!(
            at_work(Some(&options)).collect::<Vec<_>>(),
            Actuator::ALL.to_vec()
        );
    }

    #[test]
    fn a_device_is_left_where_both_it_and_its_pins_are() {
        let pins = tempfile::tempdir().unwrap();
        let missing = pins.path().join("missing");
        assert!(!is_left("lo", &missing), "no folder");
        assert!(!is_left("lo", pins.path()), "a device of somebody else's");
        std::fs::write(pins.path().join("mesh_in"), "").unwrap();
        assert!(is_left("lo", pins.path()));
        assert!(!is_left("no-such-device", pins.path()), "no device");
    }
}
