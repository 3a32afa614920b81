// Run by mongosh, once at each start of the installation; may be repeated at any time:
// makes the replica set, then one role and one user for each process of roles.json.
//
// Reads MONGODB_MEMBER (host:port, as every client resolves it), MONGODB_DATABASE and
// MONGODB_<USER>_PASSWORD for root and for each process.

const fs = require('fs');
const path = require('path');

const REPLICA_SET = 'rs0';
const PRIMARY_DEADLINE_MS = 60000;

function setting(name) {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is missing: set it in the environment of this step`);
  return value;
}

function passwordOf(user) {
  return setting(`MONGODB_${user.toUpperCase()}_PASSWORD`);
}

function ensureReplicaSet(admin, member) {
  try {
    admin.runCommand({ replSetGetStatus: 1 });
  } catch (error) {
    if (error.codeName !== 'NotYetInitialized') throw error;
    const config = { _id: REPLICA_SET, members: [{ _id: 0, host: member }] };
    admin.runCommand({ replSetInitiate: config });
  }
  const deadline = Date.now() + PRIMARY_DEADLINE_MS;
  while (!admin.runCommand({ hello: 1 }).isWritablePrimary) {
    if (Date.now() > deadline) throw new Error(`${member} did not become primary in time`);
    sleep(200);
  }
}

function ensureRole(admin, database, name, grants) {
  // the reasons in roles.json are for people; a grant without a database is for the product's own
  const privileges = grants.map(({ database: elsewhere, collection, actions }) => ({
    resource: { db: elsewhere ?? database, collection },
    actions,
  }));
  const command = admin.getRole(name) ? 'updateRole' : 'createRole';
  admin.runCommand({ [command]: name, privileges, roles: [] });
}

function ensureUser(admin, name) {
  const command = admin.getUser(name) ? 'updateUser' : 'createUser';
  admin.runCommand({ [command]: name, pwd: passwordOf(name), roles: [name] });
}

const member = setting('MONGODB_MEMBER');
const database = setting('MONGODB_DATABASE');
const roles = JSON.parse(fs.readFileSync(path.join(__dirname, 'roles.json'), 'utf8'));
const root = encodeURIComponent(passwordOf('root'));
const admin = connect(`mongodb://root:${root}@${member}/admin?directConnection=true`);

ensureReplicaSet(admin, member);
for (const [name, grants] of Object.entries(roles)) {
  ensureRole(admin, database, name, grants);
  ensureUser(admin, name);
}
print(`${REPLICA_SET} on ${member} is ready for: ${Object.keys(roles).join(', ')}`);
