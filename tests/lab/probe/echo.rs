//! Servers for probes: TCP and UDP ports of a host that send back what they get.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Host;

use super::Kind;

/// Echo servers of one host, on all its addresses, for as long as this lives.
#[derive(Debug)]
pub struct Echo {
    stop: Arc<AtomicBool>,
    heard: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// How long a server may take to notice that it shall stop.
const LOOK_UP: Duration = Duration::from_millis(100);

impl Echo {
    pub fn start(host: &Host, kinds: &[Kind]) -> Result<Self> {
        let (tcp, udp) = host.inside(|| listen(kinds))??;
        let stop = Arc::new(AtomicBool::new(false));
        let heard = Arc::new(AtomicU64::new(0));
        let (stopping, hearing) = (Arc::clone(&stop), Arc::clone(&heard));
        let thread = std::thread::spawn(move || serve(&tcp, &udp, &stopping, &hearing));
        Ok(Self {
            stop,
            heard,
            thread: Some(thread),
        })
    }

    /// How many datagrams and connections have come in, answered or not.
    pub fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

type Sockets = (Vec<TcpListener>, Vec<UdpSocket>);

fn listen(kinds: &[Kind]) -> Result<Sockets> {
    let mut sockets = Sockets::default();
    for kind in kinds {
        // Linux takes IPv4 on such a socket too.
        let any = Ipv6Addr::UNSPECIFIED;
        match *kind {
            Kind::Icmp => {}
            Kind::Tcp(port) => {
                let listener =
                    TcpListener::bind((any, port)).with_context(|| format!("listen on {kind}"))?;
                listener
                    .set_nonblocking(true)
                    .context("set a listener up")?;
                sockets.0.push(listener);
            }
            Kind::Udp(port) => {
                let socket =
                    UdpSocket::bind((any, port)).with_context(|| format!("listen on {kind}"))?;
                socket.set_nonblocking(true).context("set a socket up")?;
                sockets.1.push(socket);
            }
        }
    }
    Ok(sockets)
}

fn serve(tcp: &[TcpListener], udp: &[UdpSocket], stop: &Arc<AtomicBool>, heard: &AtomicU64) {
    let Ok(timeout) = Timespec::try_from(LOOK_UP) else {
        return;
    };
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        let mut waiting: Vec<_> = tcp
            .iter()
            .map(|socket| PollFd::new(socket, PollFlags::IN))
            .chain(udp.iter().map(|socket| PollFd::new(socket, PollFlags::IN)))
            .collect();
        let _ = poll(&mut waiting, Some(&timeout));
        drop(waiting);
        for socket in udp {
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                heard.fetch_add(1, Ordering::Relaxed);
                let _ = socket.send_to(&buffer[..length], from);
            }
        }
        for listener in tcp {
            while let Ok((connection, _)) = listener.accept() {
                heard.fetch_add(1, Ordering::Relaxed);
                let stop = Arc::clone(stop);
                std::thread::spawn(move || echo(connection, &stop));
            }
        }
    }
}

fn echo(mut connection: TcpStream, stop: &AtomicBool) {
    let set_up = connection
        .set_nonblocking(false)
        .and_then(|()| connection.set_nodelay(true))
        .and_then(|()| connection.set_read_timeout(Some(LOOK_UP)));
    if set_up.is_err() {
        return;
    }
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        match connection.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if connection.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}
