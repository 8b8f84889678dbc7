/// What a Xenbus frontend says, read at one moment after a change of its nodes (deploy/guest-module/PROTOCOL.md). All of it is the
/// guest's to choose.
package struct FrontendView: Hashable, Sendable {
  /// F/`vx-setup`.
  package enum Setup: Hashable, Sendable {
    case absent
    /// Not `SEQUENCE REFERENCE`.
    case malformed
    case page(sequence: UInt32, reference: UInt32)
  }

  /// F/`vx-cfgw`, when it is well formed: a write to the configuration space.
  package struct ConfigurationWrite: Hashable, Sendable {
    package var number: UInt32
    package var offset: Int
    package var bytes: [UInt8]

    package init(number: UInt32, offset: Int, bytes: [UInt8]) {
      self.number = number
      self.offset = offset
      self.bytes = bytes
    }
  }

  /// nil for a text that is not a XenbusState.
  package var state: XenbusState?
  package var setup: Setup
  package var write: ConfigurationWrite?

  package init(state: XenbusState? = nil, setup: Setup = .absent, write: ConfigurationWrite? = nil) {
    self.state = state
    self.setup = setup
    self.write = write
  }
}
