//! `mesh why`: what the packet path would do with a new flow now, beside what the policy says.

use std::net::Ipv6Addr;
use std::process::ExitCode;

use mesh_api::v1;
use mesh_core::policy::protocol_number;
use serde_json::{Value, json};

use super::client::Client;
use super::{Failed, Why, render, safe, say};

pub(super) async fn run(agent: &mut Client, args: &Why, json: bool) -> Result<ExitCode, Failed> {
    let (destination, port, proto) = target(&args.destination)?;
    let request = v1::WhyRequest {
        source: args.source.clone(),
        destination,
        proto: proto.into(),
        port: port.into(),
    };
    let answer = agent.why(request).await?.into_inner();
    if json {
        say(&render::pretty(&answer_json(&answer)))?;
    } else {
        for line in lines(&answer) {
            say(&safe(&line))?;
        }
    }
    // Scripts watch for the alarm.
    Ok(match answer.differs {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

/// `HOST:PORT/PROTO`, `HOST/icmp`, `[ADDRESS]:PORT/PROTO`.
fn target(text: &str) -> Result<(String, u16, u8), Failed> {
    let usage = |what: &str| {
        Failed::new(
            Failed::USAGE,
            format!(
                "{text}: {what}; write DST:PORT/PROTO, as node:22/tcp or [fd00::1]:53/udp or node/icmp"
            ),
        )
    };
    let (place, name) = text.rsplit_once('/').ok_or_else(|| usage("no protocol"))?;
    let proto = protocol(name)?;
    let is_address = place.parse::<Ipv6Addr>().is_ok() || place.ends_with(']');
    let (host, port) = match (proto, place.rsplit_once(':')) {
        (6 | 17 | 132, Some((host, port))) if !is_address => {
            (host, port.parse().map_err(|_| usage("not a port"))?)
        }
        (6 | 17 | 132, _) => return Err(usage("no port")),
        (_, Some(_)) if !is_address => return Err(usage("that protocol has no ports")),
        // An echo request. The agent knows the family.
        (1, _) => (place, 8),
        (58, _) => (place, 128),
        _ => (place, 0),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() {
        return Err(usage("no host"));
    }
    Ok((host.to_owned(), port, proto))
}

/// A protocol by name or number.
pub(super) fn protocol(text: &str) -> Result<u8, Failed> {
    if text.eq_ignore_ascii_case("icmpv6") {
        return Ok(58);
    }
    let number = protocol_number(text).or_else(|| text.parse().ok());
    number.ok_or_else(|| {
        let text = format!(
            "{text}: not a protocol; a name such as tcp, udp, icmp, icmpv6, sctp, gre, or a number"
        );
        Failed::new(Failed::USAGE, text)
    })
}

fn lines(answer: &v1::WhyResponse) -> Vec<String> {
    let mut lines = vec![format!(
        "{} > {}, {} at this node",
        answer.source, answer.destination, answer.direction
    )];
    // The packet path is the kernel's only where it may load programs.
    let judge = match answer.judged_by.as_str() {
        "" | "ebpf" => "kernel",
        judge => judge,
    };
    for (who, judgement) in [(judge, &answer.kernel), ("policy", &answer.policy)] {
        let judgement = judgement.clone().unwrap_or_default();
        let verdict = match judgement.allowed {
            true => "allowed".to_owned(),
            false => format!("denied: {}", judgement.reason),
        };
        let rule = match judgement.place.as_str() {
            "" => String::new(),
            place => format!("  {place} {}", judgement.summary),
        };
        let width = judge.len();
        lines.push(format!("{who:width$}  {verdict}{rule}"));
        if !judgement.help.is_empty() && who == judge {
            lines.push(format!("{:width$}  {}", "", judgement.help));
        }
    }
    if answer.differs {
        lines.push(
            "ALARM: the packet path does not do what the policy says; see `mesh status`".to_owned(),
        );
    }
    lines
}

fn answer_json(answer: &v1::WhyResponse) -> Value {
    let judgement = |judgement: &Option<v1::Judgement>| {
        let judgement = judgement.clone().unwrap_or_default();
        json!({
            "allowed": judgement.allowed,
            "reason": judgement.reason,
            "help": judgement.help,
            "rule": judgement.rule,
            "line": judgement.line,
            "policy": (!judgement.place.is_empty()).then_some(&judgement.place),
            "summary": judgement.summary,
        })
    };
    json!({
        "direction": answer.direction,
        "source": answer.source,
        "destination": answer.destination,
        "judged_by": answer.judged_by,
        "kernel": judgement(&answer.kernel),
        "policy": judgement(&answer.policy),
        "differs": answer.differs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_judges_is_named() {
        let judgement = |allowed| v1::Judgement {
            allowed,
            reason: "no rule".to_owned(),
            help: "add a rule".to_owned(),
            ..v1::Judgement::default()
        };
        let said = |judged_by: &str| {
            let answer = v1::WhyResponse {
                kernel: Some(judgement(false)),
                policy: Some(judgement(true)),
                judged_by: judged_by.to_owned(),
                ..v1::WhyResponse::default()
            };
            lines(&answer)[1..].to_vec()
        };
        let kernel = [
            "kernel  denied: no rule",
            "        add a rule",
            "policy  allowed",
        ];
        assert_eq!(said("ebpf"), kernel);
        let in_process = [
            "in process  denied: no rule",
            "            add a rule",
            "policy      allowed",
        ];
        assert_eq!(said("in process"), in_process);
    }

    #[test]
    fn targets_are_read_as_people_write_them() {
        let check = |text: &str, host: &str, port, proto| {
            let read = target(text).unwrap_or_else(|failed| panic!("{text}: {}", failed.text));
            assert_eq!(read, (host.to_owned(), port, proto), "{text}");
        };
        check("node:22/tcp", "node", 22, 6);
        check("100.64.0.1:53/udp", "100.64.0.1", 53, 17);
        check("[fd00::1]:53/udp", "fd00::1", 53, 17);
        check("node/icmp", "node", 8, 1);
        check("[fd00::1]/icmp", "fd00::1", 8, 1);
        check("fd00::1/icmpv6", "fd00::1", 128, 58);
        check("node/47", "node", 0, 47);
        check("fd00::1/47", "fd00::1", 0, 47);
        for bad in [
            "node",
            "node:22",
            "node/tcp",
            ":22/tcp",
            "/icmp",
            "node:x/tcp",
            "node:22/qqq",
            "node:22/47",
            "node:22/icmp",
            "fd00::1/tcp",
            "[fd00::1]/tcp",
            "fd00::1:22/tcp",
        ] {
            assert_eq!(target(bad).unwrap_err().code, Failed::USAGE, "{bad}");
        }
    }
}
