//! Hangs the packet filter on an interface of one's choice, to watch it work.
//!
//! Without a netmap every packet is one that no policy knows, so by default it only looks: packets are
//! judged, counted and told of, and go on their way. `--enforce` drops them.
#![expect(clippy::print_stdout, reason = "a command for a terminal")]

mod scratch;

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use aya_log::EbpfLogger;
use clap::{Parser, ValueEnum};
use mesh_agent::dataplane::{Counters, Dataplane, EventKind, FlowEvent, Foreign, Options};
use mesh_common::{Direction, DropReason};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, sleep};

#[derive(Debug, Parser)]
#[command(about = "Load the packet filter, attach it to an interface, and tell what it sees")]
struct Args {
    /// The interface to attach to.
    #[arg(long)]
    iface: String,
    /// Another object than the embedded one.
    #[arg(long)]
    object: Option<PathBuf>,
    /// Stop after so long; without it, on Ctrl-C.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Drop what the verdict drops: without a netmap, everything.
    #[arg(long)]
    enforce: bool,
    /// What packets start with; found out where /sys shows the interface.
    #[arg(long, value_enum)]
    link: Option<Link>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Link {
    Ethernet,
    /// The IP header: WireGuard, TUN, PPP.
    None,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_target(false)
        .with_ansi(std::io::stdout().is_terminal())
        .init();
    let run = || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(watch(Args::parse()))
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn watch(args: Args) -> Result<()> {
    let link = match args.link {
        Some(link) => link,
        None => link(&args.iface)?,
    };
    let bpffs = scratch::Bpffs::mount()?;
    let options = Options {
        pin_dir: bpffs.folder("load"),
        object_path: args.object,
        log: true,
        foreign: Some(Foreign {
            ethernet: link == Link::Ethernet,
            observe: !args.enforce,
        }),
        ..Options::default()
    };
    let mut dataplane = Dataplane::attach(&args.iface, &options)?;
    let mut logger = EbpfLogger::init(dataplane.object())?;
    let mut events = dataplane
        .events()?
        .context("nobody else asked for events")?;
    println!(
        "attached to {} ({link:?}, {}), Ctrl-C detaches",
        args.iface,
        if args.enforce {
            "dropping"
        } else {
            "looking on"
        },
    );
    let mut flush = interval(Duration::from_millis(100));
    flush.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let end = sleep(Duration::from_secs(args.seconds.unwrap_or(u64::MAX >> 20)));
    tokio::pin!(end);
    loop {
        tokio::select! {
            _ = flush.tick() => logger.flush(),
            Some(event) = events.recv() => println!("{}", describe(&event)),
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            () = &mut end => break,
        }
    }
    logger.flush();
    summarise(&dataplane.counters()?);
    dataplane.detach()?;
    println!("detached from {}", args.iface);
    Ok(())
}

/// ARPHRD_ETHER is 1, ARPHRD_NONE 65534 (linux/if_arp.h).
fn link(interface: &str) -> Result<Link> {
    let path = format!("/sys/class/net/{interface}/type");
    let kind = std::fs::read_to_string(&path)
        .with_context(|| format!("read {path}: is there such an interface? else say --link"))?;
    match kind.trim() {
        "1" | "772" => Ok(Link::Ethernet),
        "65534" | "512" => Ok(Link::None),
        other => bail!("an interface of hardware type {other}: say --link ethernet or none"),
    }
}

fn describe(event: &FlowEvent) -> String {
    let kind = event.kind().map_or("unknown event", EventKind::name);
    let reason = event.reason().map_or("", DropReason::name);
    format!(
        "{:7} {kind} {reason}: proto {} remote {}:{} local {}:{} identities {} {} rule {} bytes {}",
        event.direction().name(),
        event.key.proto,
        event.key.remote,
        event.key.remote_port.get(),
        event.key.local,
        event.key.local_port.get(),
        event.remote.0,
        event.local.0,
        event.rule.0,
        event.length,
    )
}

fn summarise(counters: &Counters) {
    for direction in Direction::ALL {
        if let Some(count) = counters.passed.get(&direction) {
            println!("{:7} passed: {} packets", direction.name(), count.packets);
        }
    }
    for ((direction, reason), count) in &counters.dropped {
        println!("{:7} {reason}: {} packets", direction.name(), count.packets);
    }
    for (kind, lost) in &counters.events_lost {
        if *lost > 0 {
            println!("{lost} events ({}) were too many to tell of", kind.name());
        }
    }
}
