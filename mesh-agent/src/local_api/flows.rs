//! The flow log, streamed.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _};
use mesh_api::v1;
use mesh_core::flow::{Place, Query, Verdict, Who};
use mesh_core::netmap::Netmap;
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tonic::Status;

use crate::flow_log::{Entry, FlowLog, since_1970};

pub(super) type Records = Pin<Box<dyn Stream<Item = Result<v1::FlowRecord, Status>> + Send>>;

/// What is remembered, and with `follow` what comes. The stream holds `turn` while it lasts.
pub(super) fn records(
    log: &FlowLog,
    follow: bool,
    query: Query,
    turn: OwnedSemaphorePermit,
) -> Records {
    let (recent, news) = log.follow();
    let recent = futures_util::stream::iter(recent);
    let entries: Pin<Box<dyn Stream<Item = Arc<Entry>> + Send>> = if follow {
        Box::pin(
            recent.chain(BroadcastStream::new(news).map(|entry| match entry {
                Ok(entry) => entry,
                Err(BroadcastStreamRecvError::Lagged(count)) => Arc::new(Entry::Lost {
                    time: since_1970(),
                    what: "this reader",
                    count,
                }),
            })),
        )
    } else {
        Box::pin(recent)
    };
    let records = entries.filter_map(move |entry| {
        let _ = &turn;
        let wanted = entry.is_wanted(&query);
        std::future::ready(wanted.then(|| Ok((&*entry).into())))
    });
    Box::pin(records)
}

pub(super) fn query(request: &v1::FlowsRequest, netmap: Option<&Netmap>) -> Result<Query, Status> {
    let invalid = |what: &str| Status::invalid_argument(format!("{what} is out of range"));
    let port = request.port.map(u16::try_from).transpose();
    let proto = request.proto.map(u8::try_from).transpose();
    let peer = Some(request.peer.as_str()).filter(|peer| !peer.is_empty());
    let verdict = Some(request.verdict.as_str()).filter(|word| !word.is_empty());
    let unknown = || Status::invalid_argument("there is no such verdict");
    let verdict = verdict.map(|word| Verdict::from_word(word).ok_or_else(unknown));
    Ok(Query {
        peer: peer.map(|peer| Who::new(peer, netmap)),
        rule: (request.line != 0).then(|| Place {
            file: (!request.file.is_empty()).then(|| request.file.clone()),
            line: request.line,
        }),
        verdict: verdict.transpose()?,
        port: port.map_err(|_| invalid("port"))?,
        proto: proto.map_err(|_| invalid("protocol"))?,
    })
}
