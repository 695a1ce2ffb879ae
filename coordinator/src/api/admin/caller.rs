//! Who is at the other end of the operators' socket: whether they may, and what they are called.

use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};

use crate::api::text::printable;

/// Who may use the admin socket besides root and the coordinator's own user.
#[derive(Debug, Clone, Default)]
pub struct Admins {
    pub own_uid: u32,
    /// A group by number, and the users that `/etc/group` lists for it.
    pub group: Option<(u32, Vec<u32>)>,
}

impl Admins {
    fn admits(&self, uid: u32, gid: u32) -> bool {
        let in_group = |(group, members): &(u32, Vec<u32>)| gid == *group || members.contains(&uid);
        uid == 0 || uid == self.own_uid || self.group.as_ref().is_some_and(in_group)
    }

    /// Lets a request in, or says why not.
    pub fn check(&self, request: Request<()>) -> Result<Request<()>, Status> {
        let info = request.extensions().get::<UdsConnectInfo>();
        match info.and_then(|info| info.peer_cred) {
            Some(peer) if self.admits(peer.uid(), peer.gid()) => Ok(request),
            Some(peer) => Err(Status::permission_denied(format!(
                "user {} may not administer this mesh: run as root, or join the admin group",
                peer.uid()
            ))),
            None => Err(Status::permission_denied(
                "the kernel does not say who is calling",
            )),
        }
    }
}

/// Who sets a policy: who is said to, else whom the kernel says to be at the other end.
pub(super) fn author<T>(request: &Request<T>, said: Option<&str>) -> String {
    if let Some(said) = said {
        return printable(said);
    }
    let info = request.extensions().get::<UdsConnectInfo>();
    let uid = info.and_then(|info| info.peer_cred).map(|peer| peer.uid());
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    uid.map_or_else(String::new, |uid| user_of(&users, uid))
}

/// A user's name by number (passwd(5)), else the number.
fn user_of(users: &str, uid: u32) -> String {
    let named = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number.parse() == Ok(uid)).then(|| name.to_owned())
    });
    named.unwrap_or_else(|| format!("uid {uid}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_named_as_passwd_names_it() {
        let users = "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/:/bin/sh\n";
        assert_eq!(user_of(users, 1000), "ann");
        assert_eq!(user_of(users, 7), "uid 7");
    }

    #[test]
    fn only_root_ourselves_and_the_group_are_admins() {
        let admins = Admins {
            own_uid: 990,
            group: Some((50, vec![1000])),
        };
        assert!(admins.admits(0, 0));
        assert!(admins.admits(990, 990));
        assert!(admins.admits(1001, 50));
        assert!(admins.admits(1000, 1000));
        assert!(!admins.admits(1001, 1001));
        assert!(!Admins::default().admits(1000, 50));
    }
}
