//! A running flow: numbered packets at a steady pace, and what came back when.
//!
//! One socket for its whole life, so that it is one flow to every firewall on its way.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::{Host, silence};

use super::{Kind, icmp, udp};

#[derive(Debug)]
pub struct Stream {
    stop: Arc<AtomicBool>,
    report: Arc<Mutex<Report>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Clone, Default)]
pub struct Report {
    pub sent: u32,
    pub received: u32,
    /// When the latest answer came.
    pub last: Option<Instant>,
}

impl Report {
    pub fn lost(&self) -> u32 {
        self.sent - self.received
    }
}

impl Stream {
    /// One packet each `pace`; TCP connects first, and fails here if it cannot.
    pub fn start(from: &Host, to: IpAddr, kind: Kind, pace: Duration) -> Result<Self> {
        let socket = from.inside(|| Socket::new(to, kind))??;
        let stop = Arc::new(AtomicBool::new(false));
        let report = Arc::new(Mutex::new(Report::default()));
        let (stopping, writing) = (Arc::clone(&stop), Arc::clone(&report));
        let thread = std::thread::spawn(move || flow(socket, pace, &stopping, &writing));
        Ok(Self {
            stop,
            report,
            thread: Some(thread),
        })
    }

    pub fn report(&self) -> Report {
        self.report
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Stops sending, waits for what is on its way, and tells all.
    pub fn finish(mut self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow!("a stream panicked"))?;
        }
        Ok(self.report())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How long the last answers are waited for.
const LINGER: Duration = Duration::from_millis(500);

fn flow(mut socket: Socket, pace: Duration, stop: &AtomicBool, report: &Mutex<Report>) {
    let mut outstanding = BTreeSet::new();
    let note = |answer: u32, outstanding: &mut BTreeSet<u32>| {
        if outstanding.remove(&answer) {
            let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
            report.received += 1;
            report.last = Some(Instant::now());
        }
    };
    let mut number = 0;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        outstanding.insert(number);
        report.lock().unwrap_or_else(PoisonError::into_inner).sent += 1;
        socket.send(number);
        number += 1;
        next += pace;
        while let Some(left) = next.checked_duration_since(Instant::now())
            && !left.is_zero()
        {
            if let Some(answer) = socket.receive(left) {
                note(answer, &mut outstanding);
            }
        }
    }
    let end = Instant::now() + silence(LINGER);
    while !outstanding.is_empty()
        && let Some(left) = end.checked_duration_since(Instant::now())
        && !left.is_zero()
    {
        if let Some(answer) = socket.receive(left) {
            note(answer, &mut outstanding);
        }
    }
}

#[derive(Debug)]
enum Socket {
    Icmp(icmp::Socket),
    Udp(UdpSocket),
    Tcp(TcpStream),
}

impl Socket {
    fn new(to: IpAddr, kind: Kind) -> Result<Self> {
        Ok(match kind {
            Kind::Icmp => Self::Icmp(icmp::Socket::to(to)?),
            Kind::Udp(port) => Self::Udp(udp(to, port)?),
            Kind::Tcp(port) => {
                let to = SocketAddr::new(to, port);
                let stream = TcpStream::connect_timeout(&to, Duration::from_secs(3))
                    .with_context(|| format!("connect to {to}"))?;
                stream.set_nodelay(true).context("set a connection up")?;
                Self::Tcp(stream)
            }
        })
    }

    /// What cannot be sent is as good as lost.
    fn send(&mut self, number: u32) {
        match self {
            Self::Icmp(socket) => socket.send(number),
            Self::Udp(socket) => drop(socket.send(&number.to_be_bytes())),
            Self::Tcp(stream) => drop(stream.write_all(&number.to_be_bytes())),
        }
    }

    /// Waits the whole limit when nothing comes, whatever the socket's trouble.
    fn receive(&mut self, limit: Duration) -> Option<u32> {
        let begun = Instant::now();
        // A limit of zero would mean for ever.
        let limit = limit.max(Duration::from_millis(1));
        let mut number = [0; 4];
        let received = match self {
            Self::Icmp(socket) => return socket.receive(limit),
            Self::Udp(socket) => {
                let _ = socket.set_read_timeout(Some(limit));
                socket.recv(&mut number).map(drop)
            }
            Self::Tcp(stream) => {
                let _ = stream.set_read_timeout(Some(limit));
                stream.read_exact(&mut number)
            }
        };
        if received.is_err() {
            std::thread::sleep(limit.saturating_sub(begun.elapsed()));
            return None;
        }
        Some(u32::from_be_bytes(number))
    }
}
