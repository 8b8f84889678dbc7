import Engines
import Glibc
import TestSupport
import Testing

/// Serialized: between fork and exec, a child process holds the descriptors, and so the locks, of a test beside it.
@Suite(.serialized) struct RawImageTests {
  private let folder = TemporaryFolder()

  private func fault(_ body: () throws -> Void) -> String? {
    do {
      try body()
      return nil
    } catch let error as ImageFault {
      return error.message
    } catch {
      return "another error: \(error)"
    }
  }

  @Test func capacityIsWholeSectors() throws {
    let image = try RawImage(
      path: folder.file("odd", bytes: 1_000_000), holder: "a", readOnly: false, discard: true, direct: false)
    #expect(image.geometry.capacity == 999_936)
    #expect(image.geometry.logicalBlock == 512)
  }

  @Test func missingImageIsNamed() {
    let words = fault { _ = try RawImage(path: "/nowhere/x", holder: "a", readOnly: false, discard: false) }
    #expect(words == "cannot open '/nowhere/x': No such file or directory")
  }

  @Test func imageThatIsTooSmallIsRefused() {
    let path = folder.file("small", bytes: 511)
    let words = fault { _ = try RawImage(path: path, holder: "a", readOnly: false, discard: false) }
    #expect(words?.contains("has 511 bytes") == true)
  }

  @Test func folderIsNoImage() {
    let words = fault { _ = try RawImage(path: "/tmp", holder: "a", readOnly: true, discard: false) }
    #expect(words?.contains("/tmp") == true)
  }

  @Test func secondWriterIsToldWhoTheFirstIs() throws {
    let path = folder.file("disk", bytes: 1 << 20)
    let first = try RawImage(path: path, holder: "web1/xvde", readOnly: false, discard: false)
    let words = fault { _ = try RawImage(path: path, holder: "web2/xvde", readOnly: false, discard: false) }
    #expect(words?.contains("in use by web1/xvde") == true)
    let reader = fault { _ = try RawImage(path: path, holder: "web3/xvde", readOnly: true, discard: false) }
    #expect(reader?.contains("in use by web1/xvde") == true)
    withExtendedLifetime(first) {}
  }

  @Test func readersShareAnImage() throws {
    let path = folder.file("disk", bytes: 1 << 20)
    let first = try RawImage(path: path, holder: "a", readOnly: true, discard: false)
    let second = try RawImage(path: path, holder: "b", readOnly: true, discard: false)
    withExtendedLifetime((first, second)) {}
  }

  @Test func lockEndsWithTheImage() throws {
    let path = folder.file("disk", bytes: 1 << 20)
    for _ in 0..<3 { _ = try RawImage(path: path, holder: "a", readOnly: false, discard: false) }
  }

  /// Another process: its pid is known from who has the file open, since the lock itself has none.
  @Test func foreignHolderIsNamedByItsProcess() throws {
    let path = folder.file("disk", bytes: 1 << 20)
    // flock(1) cannot take such locks; python can, and is on every Debian that builds vxd.
    let script = """
      import fcntl,struct,sys
      f=open(sys.argv[1],'r+b')
      fcntl.fcntl(f,37,struct.pack('hhqqi4x',1,0,0,0,0))
      print('locked',flush=True)
      sys.stdin.read()
      """
    var pipeIn: [Int32] = [0, 0]
    var pipeOut: [Int32] = [0, 0]
    #expect(pipe(&pipeIn) == 0 && pipe(&pipeOut) == 0)
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    posix_spawn_file_actions_adddup2(&actions, pipeIn[0], 0)
    posix_spawn_file_actions_adddup2(&actions, pipeOut[1], 1)
    posix_spawn_file_actions_addclose(&actions, pipeIn[1])
    var pid: pid_t = 0
    let words: [String] = ["python3", "-c", script, path]
    let arguments: [UnsafeMutablePointer<CChar>?] = words.map { strdup($0) } + [nil]
    #expect(posix_spawnp(&pid, "python3", &actions, nil, arguments, environ) == 0)
    for argument in arguments { free(argument) }
    close(pipeIn[0])
    close(pipeOut[1])
    var answer = [UInt8](repeating: 0, count: 16)
    #expect(read(pipeOut[0], &answer, 7) >= 6)
    let refusal = fault { _ = try RawImage(path: path, holder: "web1/xvde", readOnly: false, discard: false) }
    #expect(refusal?.contains("in use by process \(pid) (python3") == true, "\(refusal ?? "no fault")")
    close(pipeIn[1])
    close(pipeOut[0])
    var status: Int32 = 0
    waitpid(pid, &status, 0)
  }
}
