//! `ssh` and `sshTests`: who may log in where, as whom.
//!
//! Logins are names of the destination's own accounts, not of the mesh's users, so almost any text
//! is one; only `autogroup:nonroot` and `localpart:*@DOMAIN` mean more than themselves.

use super::super::hujson::Node;
use super::super::problem::{Complaints, Span, Spanned};
use super::super::selector::Selector;
use super::decode::{self, Fields};

#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::policy) struct SshClause {
    pub(in crate::policy) span: Span,
    pub(in crate::policy) action: SshAction,
    pub(in crate::policy) src: Vec<Spanned<Selector>>,
    pub(in crate::policy) dst: Vec<Spanned<Selector>>,
    pub(in crate::policy) logins: Vec<Login>,
    pub(in crate::policy) accept_env: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum SshAction {
    /// Only after the person has proved to be there; an approval holds for so many seconds.
    Check {
        period: Option<u64>,
    },
    Accept,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(in crate::policy) enum Login {
    Name(String),
    /// Any login but root.
    NonRoot,
    /// The local part of the e-mail address of a user of this domain.
    LocalPart(String),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::policy) struct SshTest {
    pub(in crate::policy) span: Span,
    pub(in crate::policy) src: Spanned<String>,
    pub(in crate::policy) dst: Vec<Spanned<String>>,
    pub(in crate::policy) accept: Vec<Spanned<String>>,
    pub(in crate::policy) deny: Vec<Spanned<String>>,
    pub(in crate::policy) check: Vec<Spanned<String>>,
}

pub(super) fn rules(node: &Node, complaints: &mut Complaints) -> Vec<SshClause> {
    let items = decode::list(node, "\"ssh\"", complaints);
    items
        .iter()
        .filter_map(|item| rule(item, complaints))
        .collect()
}

fn rule(node: &Node, complaints: &mut Complaints) -> Option<SshClause> {
    let mut fields = Fields::of(node, "an entry of \"ssh\"", complaints)?;
    let checks = action(&mut fields, complaints);
    let period = period(&mut fields, checks, complaints);
    let src = fields.take("src", complaints);
    let src = decode::parsed(src, "\"src\"", complaints, Selector::parse);
    let dst = fields.take("dst", complaints);
    let dst = decode::parsed(dst, "\"dst\"", complaints, Selector::parse);
    let users = fields.take("users", complaints);
    let logins = decode::parsed(users, "\"users\"", complaints, login);
    if users.is_none_or(decode::is_empty_list) {
        complaints.add(
            node.span,
            "users must be specified: a list of logins, or \"autogroup:nonroot\"",
        );
    }
    let env = fields.take("acceptEnv", complaints);
    let accept_env = decode::parsed(env, "\"acceptEnv\"", complaints, |text| match text {
        "" => Err("acceptEnv values cannot be empty".to_owned()),
        _ => Ok(text.to_owned()),
    });
    for idle in ["recorder", "enforceRecorder"] {
        fields.take(idle, complaints);
    }
    fields.finish(
        &["action", "src", "dst", "users", "checkPeriod", "acceptEnv"],
        complaints,
    );
    Some(SshClause {
        span: node.span,
        action: match checks {
            true => SshAction::Check { period },
            false => SshAction::Accept,
        },
        src,
        dst,
        logins: logins.into_iter().map(|login| login.value).collect(),
        accept_env: accept_env.into_iter().map(|env| env.value).collect(),
    })
}

/// Whether the rule asks for a check.
fn action(fields: &mut Fields<'_>, complaints: &mut Complaints) -> bool {
    let span = fields.span;
    let Some(node) = fields.take("action", complaints) else {
        complaints.add(span, "action must be specified: \"accept\" or \"check\"");
        return false;
    };
    match decode::string(node, "\"action\"", complaints) {
        Some(Spanned { value: "check", .. }) => return true,
        Some(Spanned {
            value: "accept", ..
        })
        | None => {}
        Some(Spanned { value, span }) => complaints.add(
            span,
            format!("{value:?} is not a valid action; use \"accept\" or \"check\""),
        ),
    }
    false
}

/// Longest time that an approval may hold, as in the reference.
const LONGEST_PERIOD: u64 = 168 * 3600;

fn period(fields: &mut Fields<'_>, checks: bool, complaints: &mut Complaints) -> Option<u64> {
    let node = fields.take("checkPeriod", complaints)?;
    let Spanned { value, span } = decode::string(node, "\"checkPeriod\"", complaints)?;
    if !checks {
        complaints.add(span, "checkPeriod is only valid with action \"check\"");
    }
    if value == "always" {
        return Some(0);
    }
    if let Some(rest) = value.strip_prefix('-')
        && seconds(rest).is_some()
    {
        let message = format!("checkPeriod {value} must be a positive duration");
        complaints.add(span, message);
        return None;
    }
    let Some(seconds) = seconds(value) else {
        let message = format!("checkPeriod {value:?} is not a duration; write 30m, 12h or always");
        complaints.add(span, message);
        return None;
    };
    if seconds > LONGEST_PERIOD {
        let message = format!("checkPeriod {value} is above the max (168h)");
        complaints.add(span, message);
    }
    // Nothing is the default's period, as if it were not written.
    (seconds > 0).then_some(seconds)
}

/// A duration such as `1h30m`, in whole seconds.
fn seconds(text: &str) -> Option<u64> {
    let mut total = 0.0;
    let mut rest = text;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let (number, tail) = rest.split_at(digits);
        let unit = tail.find(|c: char| c.is_ascii_digit() || c == '.');
        let (unit, tail) = tail.split_at(unit.unwrap_or(tail.len()));
        let scale = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * scale;
        rest = tail;
    }
    (total <= 1e9).then_some(total as u64)
}

fn login(text: &str) -> Result<Login, String> {
    if text == "autogroup:nonroot" {
        return Ok(Login::NonRoot);
    }
    // Whatever else begins like that is a login of that very name, as in the reference.
    if let Some(domain) = text.strip_prefix("localpart:*@")
        && !domain.is_empty()
        && !domain.contains('@')
    {
        return match domain.contains('*') {
            false => Ok(Login::LocalPart(domain.to_owned())),
            true => Err(format!(
                "user {text:?} is not valid; write \"localpart:*@DOMAIN\""
            )),
        };
    }
    match text {
        "" | "*" => Err(format!(
            "user {text:?} is not valid; name a login, or \"autogroup:nonroot\""
        )),
        _ => Ok(Login::Name(text.to_owned())),
    }
}

pub(super) fn tests(node: &Node, complaints: &mut Complaints) -> Vec<SshTest> {
    let items = decode::list(node, "\"sshTests\"", complaints);
    items
        .iter()
        .filter_map(|item| test(item, complaints))
        .collect()
}

fn test(node: &Node, complaints: &mut Complaints) -> Option<SshTest> {
    let mut fields = Fields::of(node, "an entry of \"sshTests\"", complaints)?;
    let src = decode::text(&mut fields, "src", complaints);
    let mut texts = |name: &str| {
        let quoted = format!("{name:?}");
        let node = fields.take(name, complaints);
        decode::parsed(node, &quoted, complaints, |text| Ok(text.to_owned()))
    };
    let [dst, accept, deny, check] = ["dst", "accept", "deny", "check"].map(&mut texts);
    fields.finish(&["src", "dst", "accept", "deny", "check"], complaints);
    Some(SshTest {
        span: node.span,
        src,
        dst,
        accept,
        deny,
        check,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_domain_maps_local_parts() {
        let name = |text: &str| Ok(Login::Name(text.to_owned()));
        let domain = Login::LocalPart("example.com".to_owned());
        assert_eq!(login("localpart:*@example.com"), Ok(domain));
        for text in ["localpart:ada@example.com", "localpart:ada", "localpart:*@"] {
            assert_eq!(login(text), name(text));
        }
        assert!(login("localpart:*@*").is_err());
    }

    #[test]
    fn durations_are_read_as_go_writes_them() {
        let check = |text: &str, expected| assert_eq!(seconds(text), expected, "{text}");
        check("1h30m", Some(5400));
        check("200h0m0s", Some(720_000));
        check("1.5h", Some(5400));
        check("0s", Some(0));
        for bad in ["", "1", "h", "1d", "1h-", "1e9h", "..h", "9999999999999h"] {
            check(bad, None);
        }
    }
}
